"""train_tokenizer.py on clips: what a run leaves, resuming, two processes, the schedule, --init, and codes of it."""

import json
import math
import os
import signal

import numpy as np
import pytest
from PIL import Image
from scripts import assert_equal, fails_with_one_line, log_lines, run, start, wait_for

import train_tokenizer
from checkpoint import read_weights
from clips import open_clips
from tokenizer import load_tokenizer
from video_tokenizer import VideoTokenizer, inflate

# 4 steps on clips of 5 frames, with the discriminator on; two micro-batches a step.
TINY = "--preset video_tiny --data moving-glyphs:12:AB --size 16 --frames 5 --channels 32 --multipliers 2 1 --bits 8"
TINY += " --gan-weight 0.3 --lecam-weight 0.05 --global-batch 4 --micro-batch 2 --workers 0 --steps 4 --save-every 1"
TINY += " --log-every 1 --eval-every 2 --eval-pictures 3"
TINY = TINY.split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    run("train_tokenizer.py", *TINY, "--out", out)
    return out


def state_at(out, step=4):
    return read_weights(out / f"step_{step:08d}.pt")


def without(state, *names):
    return {**state, "settings": {name: v for name, v in state["settings"].items() if name not in names}}


def test_what_a_run_leaves(whole):
    """Originals above reconstructions: all frames in the animation, the first, middle and last in the picture."""
    assert sorted(os.listdir(whole / "samples")) == [
        f"step_0000000{step}.{kind}" for step in (2, 4) for kind in ("png", "webp")
    ]
    tokenizer = load_tokenizer(whole)
    assert type(tokenizer) is VideoTokenizer and tokenizer.time_factor == 2
    clips = open_clips("moving-glyphs:12:AB", 16, 5)
    shown = [clips[0, index][0].numpy().transpose(1, 2, 3, 0) for index in (0, 5)]  # the first batch of 0, 5, 11
    with Image.open(whole / "samples" / "step_00000004.webp") as animation:
        assert (animation.n_frames, animation.size) == (5, (34, 34))
        frames = []
        for number in range(5):
            animation.seek(number)
            frames.append(np.asarray(animation.convert("RGB")))
            light = np.full((16, 2, 3), 230)
            assert np.array_equal(frames[-1][:16], np.concatenate([shown[0][number], light, shown[1][number]], 1))
    sheet = np.asarray(Image.open(whole / "samples" / "step_00000004.png").convert("RGB"))
    assert sheet.shape == (3 * 34 + 2 * 2, 34, 3)
    for row, number in enumerate((0, 2, 4)):
        assert np.array_equal(sheet[36 * row : 36 * row + 34], frames[number])
    lines = log_lines(whole)
    assert {"gan", "lecam", "hinge", "codebook_entropy"} < set(lines[0]) and "val_psnr" in lines[-1]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_interrupted_run_ends_with_the_same_weights(whole, tmp_path, number):
    process = start("train_tokenizer.py", *TINY, "--out", tmp_path)
    wait_for(tmp_path / "step_00000001.pt", process)
    os.killpg(process.pid, number)
    process.communicate()
    assert process.returncode == (0 if number == signal.SIGTERM else -number)
    assert not (tmp_path / "step_00000004.pt").exists()
    assert "resumed" in run("train_tokenizer.py", *TINY, "--out", tmp_path).stdout
    assert_equal(without(state_at(tmp_path), "out"), without(state_at(whole), "out"))
    assert log_lines(tmp_path) == log_lines(whole)


def test_two_processes_equal_two_micro_batches_and_so_do_their_codes(whole, tmp_path):
    run("train_tokenizer.py", *TINY, "--out", tmp_path / "run", processes=2)
    for line, other in zip(log_lines(tmp_path / "run"), log_lines(whole), strict=True):
        assert line == pytest.approx(other, rel=1e-5)
    codes = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        flags = ["--tokenizer", whole, "--data", "moving-glyphs:12:AB", "--size", 16, "--frames", 5, "--out", out]
        run("encode.py", *flags, processes=processes)
        codes[processes] = np.fromfile(out / "codes.bin", np.int32).reshape(12, 3 * 8 * 8)
        assert json.loads((out / "manifest.json").read_text())["grid"] == [3, 8, 8]
    assert np.array_equal(codes[1], codes[2]) and len(np.unique(codes[1])) > 1


def test_the_published_schedule():
    """Peak 1e-4, up over 2 epochs of 75 steps, a cosine to a hundredth over the rest of 150,000."""
    args = train_tokenizer.parse(["--preset", "video_128"])
    rates = [train_tokenizer.learning_rate(args, step, 75, 150_000) for step in range(150_000)]
    for step in (0, 1, 149, 150, 151, 40_000, 149_998, 149_999):
        p = (step - 150) / (150_000 - 1 - 150)
        due = step / 150 if step < 150 else 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * p))
        assert rates[step] == pytest.approx(1e-4 * due, rel=1e-12)
    assert rates[0] == 0 and rates[150] == 1e-4 and rates[-1] == pytest.approx(1e-6)
    assert (
        args.global_batch == 128 and args.epochs * 75 == 150_000 and (args.gan_weight, args.lecam_weight) == (0.3, 0.05)
    )


def test_init_from_images_and_from_videos(whole, tmp_path):
    """From a run on images both weights and average are inflated, and D begins afresh; from one on videos all is taken.
    (The first step's learning rate is 0, and an average of decay 1 stays.)"""
    image = [
        "--data",
        "glyphs:12:AB",
        *TINY[4:6],
        *TINY[8:],
        "--frames",
        0,
        "--size",
        24,
        "--multipliers",
        1,
        1,
        "--blocks",
        1,
    ]
    run("train_tokenizer.py", *image, "--steps", 2, "--out", tmp_path / "image")
    flags = [*TINY, "--size", 24, "--warmup-epochs", 9, "--ema", 1, "--steps", 1, "--eval-pictures", 1]
    done = run("train_tokenizer.py", *flags, "--init", tmp_path / "image", "--out", tmp_path / "video")
    assert "holds no discriminator of this kind: it begins afresh" in done.stdout
    state = state_at(tmp_path / "video", 1)
    for name, ema in (("tokenizer", False), ("tokenizer_ema", True)):
        assert_equal(dict(state[name]), dict(inflate(load_tokenizer(tmp_path / "image", ema=ema)).state_dict()))
    assert state["discriminator"]["main.0.weight"].shape == (64, 3, 3, 3, 3)

    run("train_tokenizer.py", *flags, "--init", whole, "--out", tmp_path / "again")
    state, first = state_at(tmp_path / "again", 1), state_at(whole)
    for name in ("tokenizer", "tokenizer_ema", "discriminator"):
        trained = {n: value for n, value in state[name].items() if "running" not in n and "batches" not in n}
        assert_equal(trained, {n: value for n, value in first[name].items() if n in trained})
    line = fails_with_one_line("train_tokenizer.py", *image, "--init", whole, "--out", tmp_path / "no")
    assert "is a tokenizer of videos: give --frames" in line


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--frames", 6], "--frames 6 is not 1 more than a multiple of 2"),
        (["--size", 17], "--size 17 is not a multiple of 2"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "glyphs"], "glyphs"),
    ],
)
def test_wrong_flags_end_in_one_line(tmp_path, flags, words):
    assert words in fails_with_one_line("train_tokenizer.py", *TINY, "--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()
