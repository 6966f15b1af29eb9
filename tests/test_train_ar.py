import functools
import os
import shutil
import signal

import pytest
import torch
from scripts import Forked, assert_equal, fails_with_one_line, log_lines, names_in, run, start, wait_for

from ar_model import ARConfig, ARTransformer, cross_entropies, load_ar
from checkpoint import read_weights, write_atomically
from data import open_codes
from tokenizer import TOKENIZER_SIZES, Tokenizer
from train_ar import rerun_in_backward

# 8 steps of a small transformer, with class dropout and dropout; two micro-batches a step.
TINY = "--width 32 --heads 2 --spatial-layers 2 --intra-layers 1 --dropout 0.1 --global-batch 8 --micro-batch 4"
TINY += " --steps 8 --save-every 1 --log-every 1 --eval-every 4 --eval-pictures 9 --lr 1e-3"


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    """A code cache of 60 glyphs by an untrained tokenizer: 16 x 16 pixels, 2 x 2 tokens, two random crops."""
    folder = tmp_path_factory.mktemp("codes")
    torch.manual_seed(0)
    model = Tokenizer(TOKENIZER_SIZES["tiny"])
    content = {"kind": "tokenizer", "config": vars(model.config), "tokenizer": model.state_dict()}
    write_atomically(folder / "tokenizer.pt", content)
    flags = ["--tokenizer", folder / "tokenizer.pt", "--data", "glyphs:60:ABC", "--size", 16, "--workers", 0]
    run("encode.py", *flags, "--out", folder / "cache")
    return folder / "cache"


@pytest.fixture(scope="module")
def flags(codes):
    return ["--codes", codes, "--val-codes", codes, *TINY.split()]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    run("train_ar.py", *flags, "--out", out)
    return out


def final(out):
    state = read_weights(out / "step_00000008.pt")
    state["settings"].pop("out")
    return state


def test_what_a_run_leaves(whole, codes):
    names = ["config.json", "log.jsonl", "samples", "step_00000007.pt", "step_00000008.pt"]
    assert names_in(whole) == names
    lines = log_lines(whole)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    # Both heads start at zero: the first loss is that of uniform guesses, ln 64 + ln 4096.
    assert steps[0]["loss"] == pytest.approx(18 * torch.tensor(2.0).log().item(), rel=1e-6)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [line["step"] for line in lines if "val_loss" in line] == [4, 8]
    model, tokenizer = load_ar(whole)
    assert model.class_names == ["A", "B", "C"] and model.config.grid == 2 and model.config.num_classes == 3
    cached = read_weights(codes / "tokenizer.pt")["tokenizer"]
    assert_equal(dict(tokenizer.state_dict()), dict(cached))


@pytest.mark.parametrize(
    "launch, number, code", [(Forked, signal.SIGKILL, -signal.SIGKILL), (start, signal.SIGTERM, 0)]
)
def test_interrupted_run_ends_with_the_same_weights(whole, flags, tmp_path, launch, number, code):
    process = launch("train_ar.py", *flags, "--out", tmp_path)
    wait_for(tmp_path / "step_00000002.pt", process)
    os.killpg(process.pid, number)
    out, _ = process.communicate()
    assert process.returncode == code and (number == signal.SIGKILL or "stopped by a signal" in out)
    assert not (tmp_path / "step_00000008.pt").exists()
    assert "resumed" in run("train_ar.py", *flags, "--out", tmp_path).stdout
    assert_equal(final(tmp_path), final(whole))
    assert log_lines(tmp_path) == log_lines(whole)


def test_what_goes_wrong_in_an_evaluation_loses_no_step(whole, flags, tmp_path):
    (tmp_path / "samples").write_text("no folder")
    line = fails_with_one_line("train_ar.py", *flags, "--save-every", 1000, "--out", tmp_path)
    assert "samples: File exists" in line
    (tmp_path / "samples").unlink()
    assert "at step 4" in run("train_ar.py", *flags, "--out", tmp_path).stdout
    assert_equal(final(tmp_path), final(whole))
    assert log_lines(tmp_path) == log_lines(whole)


def test_two_processes_equal_two_micro_batches(whole, flags, tmp_path):
    run("train_ar.py", *flags, "--out", tmp_path, processes=2)
    ours, theirs = final(tmp_path)["model"], final(whole)["model"]
    for line, other in zip(log_lines(tmp_path), log_lines(whole), strict=True):
        assert line == pytest.approx(other, rel=1e-5)
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= 1e-5 * value.norm(), name


def test_checkpointed_blocks_run_twice_with_the_same_gradients():
    config = ARConfig(32, 2, 2, 1, grid=4, num_classes=5)
    found, calls = [], []
    for rerun in (False, True):
        torch.manual_seed(0)
        model = ARTransformer(config).train()
        for head in model.head:  # zero heads would hide all gradients below them
            torch.nn.init.normal_(head.weight, std=0.02)
        blocks = [*model.spatial_blocks, *model.factorized_blocks]
        for block in blocks if rerun else []:
            rerun_in_backward(block)
            block.attention.register_forward_hook(lambda *_: calls.append(1))
        tokens = torch.randint(64, (3, 16)), torch.randint(4096, (3, 16))
        sum(cross_entropies(model(tokens, torch.tensor([0, 4, 2])), tokens)).backward()
        found.append({name: weight.grad for name, weight in model.named_parameters()})
    assert len(calls) == 2 * len(blocks)
    assert_equal(*found)
    model.generate(torch.tensor([1]), max_tokens=2)  # needs no gradient: nothing runs twice
    assert len(calls) == 2 * len(blocks) + 2 * config.spatial_layers + 2 * 2 * config.intra_layers


def test_checkpointed_activations_change_nothing(whole, flags, tmp_path):
    run("train_ar.py", *flags, "--checkpoint-activations", "--save-every", 7, "--out", tmp_path)
    assert_equal(final(tmp_path)["model"], final(whole)["model"])
    assert_equal(final(tmp_path)["optimizer"], final(whole)["optimizer"])


def _compile_without_a_compiler():
    torch.compile = functools.partial(torch.compile, backend="eager")


def test_evaluation_compiles_nothing_anew(flags, tmp_path):
    """Its last batch is smaller, and samples are drawn token by token: torch would give up, and say so."""
    done = run("train_ar.py", *flags, "--compile", "--out", tmp_path, prepare=_compile_without_a_compiler)
    assert done.stderr == ""


def test_dropout_is_a_function_of_the_seed(whole, flags, tmp_path):
    run("train_ar.py", *flags, "--dropout", 0.3, "--out", tmp_path)
    assert log_lines(tmp_path)[0]["loss"] == log_lines(whole)[0]["loss"]  # zero heads see no difference yet
    assert log_lines(tmp_path)[2]["loss"] != log_lines(whole)[2]["loss"]


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["--codes", "nowhere"], "nowhere"),
        (["--preset", "huge"], "unknown preset 'huge'"),
        (["--heads", "3"], "width 32 over 3 heads"),
        (["--micro-batch", "3"], "--micro-batch 3"),
        (["--pre-bits", "18"], "factorized_bits"),
        (["--epochs", "x"], "--epochs"),
        (["--steps", "0", "--epochs", "0"], "both 0"),
    ],
)
def test_wrong_flags_end_in_one_line(flags, tmp_path, wrong, words):
    assert words in fails_with_one_line("train_ar.py", *flags, "--out", tmp_path / "out", *wrong)
    assert not (tmp_path / "out").exists()


def test_a_run_of_the_other_stage_is_not_touched(flags, codes, tmp_path):
    path = tmp_path / "step_00000005.pt"
    write_atomically(path, read_weights(codes / "tokenizer.pt"))
    line = fails_with_one_line("train_ar.py", *flags, "--steps", 1, "--out", tmp_path)
    assert f"{path} is a checkpoint of the other stage" in line
    assert list(tmp_path.iterdir()) == [path]


def test_foreign_weights_are_passed_over(flags, tmp_path):
    write_atomically(tmp_path / "step_00000005.pt", {"weights": torch.ones(2)})
    done = run("train_ar.py", *flags, "--steps", 1, "--out", tmp_path)
    assert "is torn or damaged, or no checkpoint; passing it over" in done.stdout and "resumed" not in done.stdout


def test_a_run_goes_on_with_its_own_codes_only(whole, flags, codes, tmp_path):
    """Wherever they lie: what counts is what they are of."""
    shutil.copy(whole / "step_00000007.pt", tmp_path)
    made = ["--tokenizer", codes / "tokenizer.pt", "--data", "glyphs:60:XYZ", "--size", 16, "--workers", 0]
    run("encode.py", *made, "--out", tmp_path / "other")
    others = ["--codes", tmp_path / "other", "--val-codes", tmp_path / "other"]
    line = fails_with_one_line("train_ar.py", *flags, *others, "--out", tmp_path)
    assert "step_00000007.pt: codes of other contents; use" in line
    moved = shutil.copytree(codes, tmp_path / "moved")
    assert "at step 7" in run("train_ar.py", *flags, "--codes", moved, "--out", tmp_path).stdout
    assert log_lines(tmp_path)[-1] == log_lines(whole)[-1]


def test_a_checkpoint_older_than_the_hashes_goes_on(whole, flags, tmp_path):
    state = read_weights(whole / "step_00000007.pt")
    del state["settings"]["codes_hash"]
    write_atomically(tmp_path / "step_00000007.pt", state)
    assert "at step 7" in run("train_ar.py", *flags, "--out", tmp_path).stdout


def test_validation_codes_of_another_size(flags, codes, tmp_path):
    """Of the same tokenizer, by encode.py."""
    other = tmp_path / "other"
    size = 2 * open_codes(codes).manifest["size"]
    made = ["--tokenizer", codes / "tokenizer.pt", "--data", "glyphs:60:ABC", "--size", size, "--workers", 0]
    run("encode.py", *made, "--out", other)
    line = fails_with_one_line("train_ar.py", *flags, "--val-codes", other, "--out", tmp_path / "out")
    assert f"{other} holds" in line and "--size" in line and not (tmp_path / "out").exists()


def test_validation_codes_of_another_tokenizer(flags, codes, tmp_path):
    import json

    other = shutil.copytree(codes, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text()) | {"tokenizer_hash": "0"}
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert len(open_codes(other)) == 60
    line = fails_with_one_line("train_ar.py", *flags, "--val-codes", other, "--out", tmp_path / "out")
    assert "another tokenizer" in line


def test_help_names_presets_and_examples():
    text = run("train_ar.py", "--help").stdout
    assert "XL: 0.00024" in text and "examples:" in text
