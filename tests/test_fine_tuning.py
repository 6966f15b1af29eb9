"""Runs that begin with the weights of a file (--init), of both stages."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from golden_files import fill, named_tensor
from scripts import ROOT, assert_equal, fails_with_one_line, log_lines, run

import data
import losses
import runtime
from ar_model import ARConfig, ARTransformer, cross_entropies, load_ar
from checkpoint import read_weights, write_atomically
from lfq import split_indices
from tokenizer import Tokenizer, TokenizerConfig, load_tokenizer

# A 24 pixel tokenizer with the discriminator on; two micro-batches a step.
SCHEDULE = "--global-batch 8 --micro-batch 4 --save-every 1 --log-every 1 --eval-every 100 --eval-pictures 8"
STAGE_1 = "--data glyphs:60:AB --size 24 --gan-weight 0.1 --lecam-weight 0.05 --workers 0 --lr 1e-3 --ema 0.9 "
STAGE_1 = (STAGE_1 + SCHEDULE).split()
SMALL = ["--channels", "32", "--multipliers", "1", "1", "--blocks", "1", "--bits", "10"]
STAGE_2 = [*["--intra-layers", "1", "--dropout", "0", "--warmup-epochs", "0", "--lr", "1e-3"], *SCHEDULE.split()]


def stage_1(out, *flags, **options):
    return run("train_tokenizer.py", *STAGE_1, "--out", out, *flags, **options)


def stage_2(out, *flags, **options):
    return run("train_ar.py", *STAGE_2, "--out", out, *flags, **options)


def state_at(folder, step):
    return read_weights(folder / f"step_{step:08d}.pt")


def without(state, *names):
    return {**state, "settings": {name: v for name, v in state["settings"].items() if name not in names}}


def entries_equal(ours, theirs):
    assert_equal(dict(ours), dict(theirs))


# ----------------------------------------------------------------------------------------------------------------------
# Stage I


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run to begin with: its folder."""
    out = tmp_path_factory.mktemp("base")
    stage_1(out, *SMALL, "--steps", 3)
    return out


def first_loss(path, lpips=None, bits=10):
    """The generator's mean loss over the first batch's two micro-batches, by the file's training weights."""
    pictures = data.open_pictures("glyphs:60:AB", 24, train=True, seed=0)
    (batches,) = data.training_batches(pictures, 0, 8, 4, 0, 1, 0, 1)
    tokenizer = load_tokenizer(path, ema=False).train()
    discriminator = losses.PatchDiscriminator().train()
    content = read_weights(path)
    state = content.get("discriminator") or {
        name.removeprefix("loss.discriminator."): value
        for name, value in content["state_dict"].items()
        if name.startswith("loss.discriminator.")
    }
    discriminator.load_state_dict(state)
    found = []
    for batch in batches:
        x = data.to_float(batch.images)
        y, _, quantizer = tokenizer(x)
        found.append(losses.generator_loss(x, y, quantizer, lpips, discriminator, 0.1, 0.03)[0])
    return torch.stack(found).mean().item()


def test_a_tokenizer_run_begins_with_a_files_weights(base, tmp_path):
    """Training weights, averages and the discriminator's; the sizes are the file's, whatever preset and flags say."""
    stage_1(tmp_path, "--init", base, "--channels", 64, "--blocks", 2, "--lr", 0, "--steps", 1)
    file, ours = state_at(base, 3), state_at(tmp_path, 1)
    line = log_lines(tmp_path)[0]
    assert line["generator"] == pytest.approx(first_loss(base / "step_00000003.pt"), rel=1e-6)
    assert ours["config"] == file["config"]
    assert not torch.equal(file["tokenizer"]["encoder.conv_in.weight"], file["tokenizer_ema"]["encoder.conv_in.weight"])
    entries_equal(ours["tokenizer"], file["tokenizer"])  # --lr 0
    for name, value in file["discriminator"].items():
        assert "running" in name or "tracked" in name or torch.equal(ours["discriminator"][name], value), name
    assert (
        ours["discriminator"]["main.3.num_batches_tracked"] == file["discriminator"]["main.3.num_batches_tracked"] + 6
    )
    for part in ("tokenizer", "discriminator"):
        for name, value in ours[f"{part}_ema"].items():
            if "running" not in name and "tracked" not in name:
                due = 0.9 * file[f"{part}_ema"][name] + 0.1 * file[part][name]
                torch.testing.assert_close(value, due, rtol=1e-5, atol=1e-7, msg=name)
    moments = ours["optimizer_tokenizer"]["state"][0]
    assert moments["step"] == 1
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["channels"], config["multipliers"], config["blocks"], config["bits"]) == (32, [1, 1], 1, 10)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A file of small networks with the entries of a released tokenizer, each filled by its name."""
    path = tmp_path_factory.mktemp("released") / "small.ckpt"
    tokenizer, discriminator = Tokenizer(TokenizerConfig(32, (1, 1), 1, 10)), losses.PatchDiscriminator()
    state = dict(tokenizer.state_dict()) | discriminator.state_dict(prefix="loss.discriminator.")
    state |= losses.LPIPS().state_dict(prefix="loss.perceptual_loss.")
    entries = {name: named_tensor(name, tuple(value.shape)) for name, value in state.items()}
    trained = [*tokenizer.state_dict(), *(f"loss.discriminator.{n}" for n, _ in discriminator.named_parameters())]
    for name in trained:
        short = "model_ema." + name.replace(".", "")
        entries[short] = named_tensor(short, tuple(state[name].shape))
    for name in [name for name in entries if name.endswith((".shift", ".scale"))]:
        entries[name] = state[name]
    torch.save({"state_dict": entries}, path)
    return path


def test_a_tokenizer_run_begins_with_a_released_file(released, tmp_path, monkeypatch):
    """Which carries LPIPS, too: nothing is downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    flags = ["--lpips", "published", "--lr", 0, "--steps", 1]
    done = stage_1(tmp_path / "out", "--init", released, *flags)
    assert "begins afresh" not in done.stdout and not (tmp_path / "cache").exists()
    entries, ours = read_weights(released)["state_dict"], state_at(tmp_path / "out", 1)
    lpips = fill(losses.LPIPS(), "loss.perceptual_loss.", keep=("shift", "scale"))
    line = log_lines(tmp_path / "out")[0]
    assert line["lpips"] > 0 and line["generator"] == pytest.approx(first_loss(released, lpips), rel=1e-6)
    for part, prefix in (("tokenizer", ""), ("discriminator", "loss.discriminator.")):
        for name, value in ours[f"{part}_ema"].items():
            if "running" in name or "tracked" in name:  # have no average: the weights' own
                assert torch.equal(value, entries[prefix + name]), name
                continue
            assert torch.equal(ours[part][name], entries[prefix + name]), name
            average = entries["model_ema." + (prefix + name).replace(".", "")]
            torch.testing.assert_close(value, 0.9 * average + 0.1 * entries[prefix + name], rtol=1e-5, atol=1e-7)


def test_another_kind_of_discriminator_is_left_out(released, tmp_path):
    """As in the tokenizer of 2^14 codes that was pretrained at scale."""
    entries = read_weights(released)["state_dict"]
    entries = {name: value for name, value in entries.items() if "discriminator" not in name}
    other = "loss.discriminator.block_in.0.weight"
    entries |= {other: torch.ones(2, 3), "model_ema." + other.replace(".", ""): torch.ones(2, 3)}
    torch.save({"state_dict": entries}, tmp_path / "other.ckpt")
    done = stage_1(tmp_path / "out", "--init", tmp_path / "other.ckpt", "--lr", 0, "--steps", 1)
    assert f"{tmp_path / 'other.ckpt'} holds no discriminator of this kind: it begins afresh" in done.stdout
    runtime.seed_everything(0)
    Tokenizer(TokenizerConfig(32, (1, 1), 1, 10))
    fresh = losses.PatchDiscriminator().state_dict()
    ours = state_at(tmp_path / "out", 1)["discriminator"]
    assert torch.equal(ours["main.0.weight"], fresh["main.0.weight"])
    done = stage_1(tmp_path / "plain", "--init", tmp_path / "other.ckpt", "--gan-weight", 0, "--steps", 1)
    assert "afresh" not in done.stdout  # none wanted


def test_a_wrong_discriminator_is_named(base, tmp_path):
    state = state_at(base, 3)
    del state["discriminator_ema"]["main.3.bias"]
    write_atomically(tmp_path / "x.pt", state)
    flags = ["--init", tmp_path / "x.pt", "--steps", 1, "--out", tmp_path / "out"]
    assert "x.pt does not hold a PatchGAN discriminator: entry main.3.bias is missing" in fails_with_one_line(
        "train_tokenizer.py", *STAGE_1, *flags
    )


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """A run from `base` that nothing interrupted."""
    out = tmp_path_factory.mktemp("tuned")
    stage_1(out, "--init", base, "--steps", 4, "--keep-every", 1)
    return out


def test_a_resumed_tokenizer_run_equals_an_uninterrupted_one(base, tuned, tmp_path):
    """Also from a copy of the file; but not from another one, nor from itself, nor from none."""
    (tmp_path / "out").mkdir()
    shutil.copy(tuned / "step_00000002.pt", tmp_path / "out")
    copy = shutil.copy(base / "step_00000003.pt", tmp_path / "copy.pt")
    assert "at step 2" in stage_1(tmp_path / "out", "--init", copy, "--steps", 4, "--keep-every", 1).stdout
    assert_equal(*(without(state_at(out, 4), "out", "init") for out in (tmp_path / "out", tuned)))
    flags = [*STAGE_1, "--steps", 4, "--keep-every", 1, "--out", tmp_path / "out"]
    for other in (["--init", base / "step_00000002.pt"], ["--init", tmp_path / "out"], SMALL):
        assert "step_00000004.pt: init of other contents; use" in fails_with_one_line(
            "train_tokenizer.py", *flags, *other
        )


def test_no_run_becomes_a_fine_tuning(base, tmp_path):
    """Of this version, or from before there was --init."""
    state = state_at(base, 3)
    for name in ("init", "init_hash"):
        state = without(state, name) if name == "init" else state
        write_atomically(tmp_path / "step_00000003.pt", state)
        flags = [*STAGE_1, "--steps", 3, "--init", base / "step_00000002.pt", "--out", tmp_path]
        assert "init of other contents; use" in fails_with_one_line("train_tokenizer.py", *flags)
        state = without(state, "init", "init_hash")
    assert "resumed" in stage_1(tmp_path, *SMALL, "--steps", 3).stdout


def test_two_processes_fine_tune_as_one(base, tuned, tmp_path):
    stage_1(tmp_path, "--init", base, "--steps", 4, processes=2)
    for line, other in zip(log_lines(tmp_path), log_lines(tuned), strict=True):
        assert line == pytest.approx(other, rel=1e-5)
    ours, theirs = state_at(tmp_path, 4), state_at(tuned, 4)
    for part in ("tokenizer", "tokenizer_ema", "discriminator_ema"):
        for name, value in theirs[part].items():
            if "running" not in name and "tracked" not in name:
                assert (ours[part][name] - value).norm() <= 1e-4 * value.norm() + 1e-6, (part, name)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "script, name, words",
    [
        ("train_tokenizer.py", "512_L", "there is no file or folder 512_L; released names: 128_L, 256_L, pretrain"),
        ("train_tokenizer.py", "ar.pt", "ar.pt is no whole file of this project: .* carries no tokenizer"),
        ("train_ar.py", "nowhere/x.pt", "there is no file or folder .*x.pt; released names: B, L, XL"),
        ("train_ar.py", "tokenizer.pt", "tokenizer.pt is a tokenizer file"),
        ("train_ar.py", "ar.pt", "ar.pt takes codes of 18 bits; .*ABC has 10"),
    ],
)
def test_what_cannot_be_begun_with(tmp_path, base, codes, script, name, words, processes):
    config = ARConfig(32, 2, 1, 1, num_classes=2, grid=2)
    content = {"kind": "ar", "config": vars(config), "class_names": None, "tokenizer": None}
    write_atomically(tmp_path / "ar.pt", content | {"model": ARTransformer(config).state_dict()})
    shutil.copy(base / "step_00000003.pt", tmp_path / "tokenizer.pt")
    flags = [*STAGE_1] if script == "train_tokenizer.py" else [*STAGE_2, "--codes", codes["ABC"]]
    init = name if name == "512_L" else tmp_path / name
    done = run(script, *flags, "--init", init, "--steps", 1, "--out", tmp_path / "out", processes=processes, code=2)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == processes and all(re.search(words, line) for line in lines), done.stderr
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Stage II


@pytest.fixture(scope="module")
def codes(base, tmp_path_factory):
    """Caches of glyphs by `base`, 16 x 16 pixels, 8 x 8 tokens of 10 bits; "other" by an earlier `base`."""
    folder, made = tmp_path_factory.mktemp("codes"), {}
    for name, tokenizer, classes in [
        ("ABCDE", base, "ABCDE"),
        ("ABC", base, "ABC"),
        ("XYZ", base, "XYZ"),
        ("other", base / "step_00000002.pt", "ABC"),
    ]:
        flags = ["--tokenizer", tokenizer, "--data", f"glyphs:30:{classes}", "--size", 16, "--workers", 0]
        run("encode.py", *flags, "--out", folder / name)
        made[name] = folder / name
    return made


@pytest.fixture(scope="module")
def transformer(codes, tmp_path_factory):
    """A run on three classes to begin with: its folder."""
    out = tmp_path_factory.mktemp("transformer")
    size = ["--width", "32", "--heads", "2", "--spatial-layers", "2", "--pre-bits", "4"]
    stage_2(out, "--codes", codes["ABC"], *size, "--steps", 3)
    return out


TABLE = "class_emb.embedding_table.weight"


def first_cross_entropy(state, cache):
    """The first batch's, by a checkpoint's weights; classes drop out as in training."""
    model = ARTransformer(ARConfig(**state["config"])).train()
    model.load_state_dict(state["model"])
    order, opened, found = data.SampleOrder(30, 0), data.open_codes(cache), []
    for number in range(2):
        indices, labels = opened.batch(order.at(4 * number, 4), 0)
        runtime.seed_everything(0, 0, number)
        sub_indices = split_indices(indices, (4, 6))
        with torch.no_grad():
            found.append(sum(cross_entropies(model(sub_indices, labels), sub_indices)))
    return torch.stack(found).mean().item()


def test_a_transformer_run_begins_with_a_files_weights(codes, transformer, tmp_path):
    flags = ["--width", 64, "--pre-bits", 5, "--init", transformer, "--lr", 0, "--steps", 1]
    done = stage_2(tmp_path, "--codes", codes["ABC"], *flags)
    assert "afresh" not in done.stdout and "warning" not in done.stdout
    file, ours = state_at(transformer, 3), state_at(tmp_path, 1)
    entries_equal(ours["model"], file["model"])
    assert ours["optimizer"]["state"][0]["step"] == 1
    assert log_lines(tmp_path)[0]["loss"] == pytest.approx(first_cross_entropy(file, codes["ABC"]), rel=1e-6)
    config = json.loads((tmp_path / "config.json").read_text())
    sizes = {"width": 32, "heads": 2, "spatial_layers": 2, "pre_bits": 4, "dropout": 0}
    assert {name: config[name] for name in sizes} == sizes


@pytest.mark.parametrize("classes", ["ABCDE", "XYZ"])
def test_other_classes_begin_afresh(codes, transformer, tmp_path, classes):
    """Another number of them, or other names; all else is the file's."""
    done = stage_2(tmp_path, "--codes", codes[classes], "--init", transformer, "--lr", 0, "--steps", 1)
    assert "knows other classes than" in done.stdout
    file, ours = state_at(transformer, 3)["model"], state_at(tmp_path, 1)["model"]
    table = ours.pop(TABLE)
    entries_equal(ours, {name: value for name, value in file.items() if name != TABLE})
    assert table.shape == (len(classes) + 1, 32) and 0.01 < table.std() < 0.03
    assert len(file[TABLE]) != len(table) or not torch.equal(file[TABLE], table)
    assert load_ar(tmp_path)[0].class_names == list(classes)


def test_codes_of_another_tokenizer_are_warned_of(codes, transformer, tmp_path):
    done = stage_2(tmp_path, "--codes", codes["other"], "--init", transformer, "--steps", 1, processes=2)
    words = f"warning: {codes['other']} was made by another tokenizer than {transformer / 'step_00000003.pt'} was"
    assert done.stdout.count(words) == 1


def test_a_file_that_knows_no_names_keeps_its_classes(codes, transformer, tmp_path):
    """A released one, say, where there are as many."""
    write_atomically(tmp_path / "x.pt", state_at(transformer, 3) | {"class_names": None})
    done = stage_2(tmp_path / "out", "--codes", codes["XYZ"], "--init", tmp_path / "x.pt", "--lr", 0, "--steps", 1)
    assert "afresh" not in done.stdout
    entries_equal(state_at(tmp_path / "out", 1)["model"], state_at(transformer, 3)["model"])


def test_a_resumed_transformer_run_equals_an_uninterrupted_one(codes, transformer, tmp_path):
    flags = ["--codes", codes["XYZ"], "--init", transformer, "--steps", 4, "--keep-every", 1]
    stage_2(tmp_path / "whole", *flags)
    (tmp_path / "again").mkdir()
    shutil.copy(tmp_path / "whole" / "step_00000002.pt", tmp_path / "again")
    assert "at step 2" in stage_2(tmp_path / "again", *flags).stdout
    assert_equal(*(without(state_at(tmp_path / name, 4), "out") for name in ("whole", "again")))
    for other in ("step_00000002.pt", None):
        init = ["--init", transformer / other] if other else ["--init", tmp_path / "again"]
        line = fails_with_one_line("train_ar.py", *STAGE_2, *flags, *init, "--out", tmp_path / "again")
        assert "init of other contents; use" in line


def test_fine_tuning_of_two_processes_equals_one(codes, transformer, tmp_path):
    flags = ["--codes", codes["ABCDE"], "--init", transformer, "--steps", 2]
    stage_2(tmp_path / "plain", *flags)
    stage_2(tmp_path / "two", *flags, processes=2)
    plain = state_at(tmp_path / "plain", 2)["model"]
    for line, other in zip(log_lines(tmp_path / "two"), log_lines(tmp_path / "plain"), strict=True):
        assert line == pytest.approx(other, rel=1e-5)
    for entry, value in state_at(tmp_path / "two", 2)["model"].items():
        assert (value - plain[entry]).norm() <= 1e-5 * plain[entry].norm(), entry


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU


def on_a_gpu(script, *flags):
    words = [sys.executable, ROOT / script, *flags, "--precision", "fp32"]
    subprocess.run([str(w) for w in words], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300)


@pytest.mark.gpu
def test_tokenizer_on_a_gpu(base, tmp_path):
    flags = [*STAGE_1, "--init", base, "--steps", 2, "--lr", 0]
    on_a_gpu("train_tokenizer.py", *flags, "--out", tmp_path)
    loss = first_loss(base / "step_00000003.pt")
    assert log_lines(tmp_path)[0]["generator"] == pytest.approx(loss, rel=1e-3)
    file, ours = state_at(base, 3), state_at(tmp_path, 2)
    entries_equal(ours["tokenizer"], file["tokenizer"])
    for name, value in ours["tokenizer_ema"].items():
        due = 0.81 * file["tokenizer_ema"][name] + 0.19 * file["tokenizer"][name]
        torch.testing.assert_close(value, due, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
def test_transformer_on_a_gpu(codes, transformer, tmp_path):
    flags = [*STAGE_2, "--codes", codes["ABC"], "--init", transformer, "--steps", 1, "--lr", 0]
    on_a_gpu("train_ar.py", *flags, "--out", tmp_path)
    file = state_at(transformer, 3)
    entries_equal(state_at(tmp_path, 1)["model"], file["model"])
    # (Classes drop out by the GPU's generator: the loss of other classes, of weights that know them little.)
    assert log_lines(tmp_path)[0]["loss"] == pytest.approx(first_cross_entropy(file, codes["ABC"]), rel=1e-2)
