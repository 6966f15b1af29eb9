import os
import signal

import pytest
import torch
from golden_files import fill
from PIL import Image
from scripts import assert_equal, fails_with_one_line, log_lines, names_in, run, start, wait_for

from checkpoint import read_weights, restore
from losses import LPIPS
from tokenizer import load_tokenizer

# 8 steps of a 24 pixel tokenizer with the discriminator on; two micro-batches a step.
TINY = "--data glyphs:60:AB --size 24 --channels 32 --multipliers 1 1 --blocks 1 --gan-weight 0.1 --lecam-weight 0.05"
TINY += " --global-batch 8 --micro-batch 4 --workers 0 --steps 8 --save-every 1 --log-every 1 --eval-every 4"
TINY = [*TINY.split(), "--lr", "1e-3"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    run("train_tokenizer.py", *TINY, "--out", out)
    return out


def test_a_restored_optimizer_lies_in_memory_as_its_parameters(tmp_path):
    """Moments in one layout, of a CPU, go on beside weights in another, of a GPU."""

    def parts(layout):
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=layout)
        return model, torch.optim.Adam(model.parameters(), 0.1, fused=True)

    def step(model, optimizer, seed):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()

    model, optimizer = parts(torch.contiguous_format)
    other, other_optimizer = parts(torch.channels_last)
    step(model, optimizer, 1)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    parts = {"model": other, "optimizer": other_optimizer}
    restore(parts, read_weights(tmp_path / "x.pt"), tmp_path / "x.pt")
    moments = other_optimizer.state[other.weight]
    assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == other.weight.stride()
    step(model, optimizer, 2)
    step(other, other_optimizer, 2)
    assert torch.allclose(model.weight, other.weight, rtol=1e-5, atol=1e-6)


def final(out):
    return read_weights(out / "step_00000008.pt")


def without_folder(state):
    return {**state, "settings": {k: v for k, v in state["settings"].items() if k != "out"}}


def test_what_a_run_leaves(whole):
    assert names_in(whole) == ["config.json", "log.jsonl", "samples", "step_00000007.pt", "step_00000008.pt"]
    lines = log_lines(whole)
    assert [line["step"] for line in lines if "generator" in line] == list(range(1, 9))
    assert {"l1", "gan", "sample_entropy", "codebook_entropy", "commitment", "hinge", "lecam", "lr"} < set(lines[0])
    assert [line["step"] for line in lines if "val_psnr" in line] == [4, 8]
    state = final(whole)
    assert not any("module." in name for name in state["tokenizer"])
    assert all(value != 0 for value in state["lecam"].values())
    averaged, raw = load_tokenizer(whole), load_tokenizer(whole, ema=False)
    assert torch.equal(averaged.encoder.conv_out.weight, state["tokenizer_ema"]["encoder.conv_out.weight"])
    assert not torch.equal(averaged.encoder.conv_out.weight, raw.encoder.conv_out.weight)


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)])
def test_interrupted_run_ends_with_the_same_weights(whole, tmp_path, number, code):
    process = start("train_tokenizer.py", *TINY, "--out", tmp_path)
    wait_for(tmp_path / "step_00000002.pt", process)
    os.killpg(process.pid, number)
    out, _ = process.communicate()
    assert process.returncode == code and (number == signal.SIGKILL or "stopped by a signal" in out)
    assert not (tmp_path / "step_00000008.pt").exists()
    again = run("train_tokenizer.py", *TINY, "--out", tmp_path)
    assert "resumed" in again.stdout
    assert_equal(without_folder(final(tmp_path)), without_folder(final(whole)))
    assert log_lines(tmp_path) == log_lines(whole)


def test_torn_checkpoint_is_passed_over(whole, tmp_path):
    for step in (7, 8):
        content = (whole / f"step_0000000{step}.pt").read_bytes()
        if step == 8:
            content = content[: len(content) // 2]
        (tmp_path / f"step_0000000{step}.pt").write_bytes(content)
    done = run("train_tokenizer.py", *TINY, "--out", tmp_path)
    assert "step_00000008.pt is torn or damaged" in done.stdout and "at step 7" in done.stdout
    assert_equal(without_folder(final(tmp_path)), without_folder(final(whole)))


def test_what_goes_wrong_in_an_evaluation_loses_no_step(whole, tmp_path):
    """Not even of its log: the run that goes on makes up for the evaluation."""
    (tmp_path / "samples").write_text("no folder")
    line = fails_with_one_line("train_tokenizer.py", *TINY, "--save-every", 1000, "--out", tmp_path)
    assert line == f"train_tokenizer.py: cannot read or write {tmp_path / 'samples'}: File exists"
    (tmp_path / "samples").unlink()
    assert "at step 4" in run("train_tokenizer.py", *TINY, "--out", tmp_path).stdout
    assert_equal(without_folder(final(tmp_path)), without_folder(final(whole)))
    assert log_lines(tmp_path) == log_lines(whole)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["step_00000004.png", "step_00000008.png"]


def test_two_processes_equal_two_micro_batches(whole, tmp_path):
    run("train_tokenizer.py", *TINY, "--out", tmp_path, processes=2)
    ours, theirs = final(tmp_path), final(whole)
    for line, other in zip(log_lines(tmp_path), log_lines(whole), strict=True):
        assert line == pytest.approx(other, rel=1e-6)
    start_weights = initial_weights()
    for part in ("tokenizer", "discriminator"):
        names = [name for name in ours[part] if "running" not in name and "batches" not in name]
        moved = sum((theirs[part][n].double() - start_weights[part][n].double()).square().sum() for n in names)
        apart = sum((theirs[part][n].double() - ours[part][n].double()).square().sum() for n in names)
        assert moved > 0 and (apart / moved).sqrt() < 1e-6, part
    for name in ("real", "fake"):
        assert ours["lecam"][name].item() == pytest.approx(theirs["lecam"][name].item(), rel=1e-6)


def test_global_entropy_of_two_processes_is_that_of_one_large_micro_batch(tmp_path):
    # No discriminator: its BatchNorm is per device and would see the two halves apart.
    flags = [*TINY, "--gan-weight", 0, "--entropy-weight", 1, "--steps", 1]
    found = {}
    for name, processes, more in [("one", 1, ["--micro-batch", 8]), ("two", 2, ["--global-entropy"]), ("own", 2, [])]:
        run("train_tokenizer.py", *flags, *more, "--out", tmp_path / name, processes=processes)
        state = read_weights(tmp_path / name / "step_00000001.pt")["optimizer_tokenizer"]["state"]
        # Adam's first mean is half the first gradient.
        found[name] = (
            log_lines(tmp_path / name)[0],
            torch.cat([entry["exp_avg"].flatten() for entry in state.values()]),
        )
    line, gradient = found["one"]
    assert found["two"][0] == pytest.approx(line, rel=1e-6)
    assert (found["two"][1] - gradient).norm() < 1e-5 * gradient.norm()
    assert found["own"][0]["codebook_entropy"] != pytest.approx(line["codebook_entropy"], rel=1e-3)
    assert (found["own"][1] - gradient).norm() > 1e-2 * gradient.norm()


def initial_weights():
    import runtime
    from losses import PatchDiscriminator
    from tokenizer import Tokenizer, TokenizerConfig

    runtime.seed_everything(0)
    tokenizer = Tokenizer(TokenizerConfig(32, (1, 1), 1))
    return {"tokenizer": tokenizer.state_dict(), "discriminator": PatchDiscriminator().state_dict()}


def test_lpips_from_a_file(tmp_path):
    lpips = fill(LPIPS(), "loss.perceptual_loss.", keep=("shift", "scale"))
    torch.save(lpips.state_dict(), tmp_path / "lpips.pt")
    run("train_tokenizer.py", *TINY, "--steps", 2, "--lpips", tmp_path / "lpips.pt", "--out", tmp_path / "out")
    lines = [line for line in log_lines(tmp_path / "out") if "generator" in line]
    assert len(lines) == 2 and all(line["lpips"] > 0 for line in lines)


def test_changed_settings_stop_a_resume(whole):
    wrong = ["--lr", 1e-2, "--seed", 3, "--steps", 9]
    line = fails_with_one_line("train_tokenizer.py", *TINY, *wrong, "--out", whole)
    assert "--lr was 0.001, is 0.01" in line and "--seed was 0, is 3" in line
    assert "; use those settings" in line and ", total steps was 8, is 9" in line  # no flag


def test_a_run_goes_on_with_its_own_pictures_only(tmp_path):
    """However their folder is written."""
    for number, name in enumerate(["a/0.png", "a/1.png", "b/2.png", "b/3.png"]):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24), (60 * number, 9, 9)).save(tmp_path / "d" / name)
    (tmp_path / "link").symlink_to("d")
    flags = [*TINY, "--gan-weight", 0, "--global-batch", 4, "--steps", 1, "--out", tmp_path / "out"]
    run("train_tokenizer.py", *flags, "--data", tmp_path / "d")
    for same in (f"{tmp_path}/d/", f"{tmp_path}/./d", tmp_path / "link"):
        assert "at step 1" in run("train_tokenizer.py", *flags, "--data", same).stdout
    (tmp_path / "d" / "b").rename(tmp_path / "d" / "c")
    line = fails_with_one_line("train_tokenizer.py", *flags, "--data", tmp_path / "d")
    assert "pictures of other contents; use" in line


def test_pictures_need_no_class_folders(tmp_path):
    for number in range(5):
        folder = tmp_path / ("d" if number < 4 else "val")
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (30, 24), (60 * number, 9, 9)).save(folder / f"{number}.png")
    flags = [*TINY, "--gan-weight", 0, "--global-batch", 4, "--steps", 1, "--data", tmp_path / "d"]
    done = run("train_tokenizer.py", *flags, "--val-data", tmp_path / "val", "--out", tmp_path / "out")
    assert "4 pictures, 1 steps an epoch" in done.stdout and (tmp_path / "out" / "step_00000001.pt").exists()
    assert "resumed" in run("train_tokenizer.py", *flags, "--out", tmp_path / "out").stdout


def test_a_flag_younger_than_the_checkpoint_was_off(whole, tmp_path):
    state = final(whole)
    del state["settings"]["global_entropy"]
    torch.save(state, tmp_path / "step_00000008.pt")
    assert "resumed" in run("train_tokenizer.py", *TINY, "--out", tmp_path).stdout
    line = fails_with_one_line("train_tokenizer.py", *TINY, "--global-entropy", "--out", tmp_path)
    assert "--global-entropy was False, is True" in line


def test_the_rate_drops_within_an_epoch(tmp_path):
    """Of 8 steps; 60 pictures by 8."""
    run("train_tokenizer.py", *TINY, "--lr-drops", 0.5, "--gan-weight", 0, "--out", tmp_path)
    rates = [line["lr"] for line in log_lines(tmp_path) if "lr" in line]
    assert rates == pytest.approx([1e-3] * 4 + [1e-4] * 4, rel=1e-12)


def test_non_finite_loss_stops_and_names_the_step(tmp_path):
    process = run("train_tokenizer.py", *TINY, "--lr", 1e30, "--out", tmp_path, code=2)
    assert "non-finite at step 2" in process.stderr and "step_00000001.pt" in process.stderr


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data", "nowhere"], "nowhere"),
        (["--preset", "huge"], "unknown preset 'huge'"),
        (["--size", "17"], "--size 17 is not a multiple of 2"),
        (["--size", "16"], "discriminator needs 24 pixels"),
        (["--global-batch", "9"], "--global-batch 9"),
        (["--precision", "fp8"], "fp8"),
        (["--lpips", "nowhere.pt"], "nowhere.pt"),
        (["--stepz", "3"], "--stepz"),
        (["--steps", "0", "--epochs", "0"], "both 0"),
        (["--channels", "-32"], "channels must be"),
        (["--multipliers", "0", "1"], "multipliers and blocks must be at least 1"),
        (["--blocks", "0"], "multipliers and blocks must be at least 1"),
        (["--bits", "40"], "bits must be 1 to 30"),
    ],
)
def test_wrong_flags_end_in_one_line(tmp_path, flags, words):
    assert words in fails_with_one_line("train_tokenizer.py", *TINY, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_help_names_presets_and_examples():
    text = run("train_tokenizer.py", "--help").stdout
    assert "256_L: 256" in text and "examples:" in text
