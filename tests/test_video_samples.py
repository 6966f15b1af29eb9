"""Stage II on clips: train_ar.py on their codes, and what sample.py makes of them."""

import dataclasses
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import assert_equal, log_lines, names_in, run

import data
import runtime
import sample
from ar_model import ARConfig, ARTransformer, load_ar
from checkpoint import read_weights, write_atomically
from clips import _read_frames, write_video
from runtime import UserError
from tokenizer import Tokenizer, TokenizerConfig
from video_tokenizer import VideoTokenizer

SIZE = TokenizerConfig(32, (2, 2), 1, bits=8)  # by 2 in space and in time
CONFIG = ARConfig(32, 2, 1, 1, factorized_bits=(6, 2), grid=(3, 4, 4), num_classes=3)  # 5 frames of 8 x 8 pixels
PAPER_B = {"cfg_scale": (1.9, 2.0)}  # temperature 1, no filter
SHOW = {"cfg_scale": (4.0, 4.0), "top_p": (0.96, 0.96)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the subprocesses run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- Training ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Of 3 steps on the codes of 12 moving glyphs, by an untrained tokenizer; two micro-batches a step."""
    folder = tmp_path_factory.mktemp("codes")
    torch.manual_seed(0)
    content = {"kind": "tokenizer", "config": vars(SIZE), "tokenizer": VideoTokenizer(SIZE).state_dict()}
    write_atomically(folder / "tokenizer.pt", content)
    made = ["--tokenizer", folder / "tokenizer.pt", "--data", "moving-glyphs:12:AB", "--size", 16, "--frames", 5]
    run("encode.py", *made, "--workers", 0, "--out", folder / "cache")
    words = "--preset video_tiny --width 32 --heads 2 --spatial-layers 1 --dropout 0.1 --global-batch 4 --micro-batch 2"
    words += " --steps 3 --log-every 1 --save-every 1 --eval-every 3 --eval-pictures 5"
    return ["--codes", folder / "cache", "--val-codes", folder / "cache", *words.split()]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run("train_ar.py", *flags, "--out", out)
    return out


def final(out):
    state = read_weights(out / "step_00000003.pt")
    state["settings"].pop("out")
    return state


@torch.no_grad()
def test_what_a_run_leaves(whole):
    assert names_in(whole) == ["config.json", "log.jsonl", "samples", "step_00000002.pt", "step_00000003.pt"]
    lines = log_lines(whole)
    # Both heads start at zero: the first loss is that of uniform guesses, ln 2^6 + ln 2^2.
    assert lines[0]["loss"] == pytest.approx(8 * np.log(2), rel=1e-6) and lines[-1]["val_loss"] < lines[0]["loss"]
    model, tokenizer = load_ar(whole)
    assert model.config.grid == (3, 8, 8) and model.class_names == ["A", "B"] and type(tokenizer) is VideoTokenizer
    assert sorted(os.listdir(whole / "samples")) == ["step_00000003.png", "step_00000003.webp"]
    indices = model.generate(torch.tensor([0] * 4 + [1] * 4), **SHOW).view(8, 3, 8, 8)
    clips = torch.cat([shown(tokenizer.decode(part)) for part in indices.split(4)])
    frames = np.stack(list(_read_frames(whole / "samples" / "step_00000003.webp")))
    np.testing.assert_array_equal(frames, data.tile(clips, columns=4).movedim(0, -1))  # a class a row
    sheet = np.asarray(Image.open(whole / "samples" / "step_00000003.png"))
    assert frames.shape == (5, 34, 70, 3) and sheet.shape == (3 * 36 - 2, 70, 3)
    for row, number in enumerate((0, 2, 4)):
        np.testing.assert_array_equal(sheet[36 * row : 36 * row + 34], frames[number])


def test_a_run_goes_on_and_two_processes_equal_two_micro_batches(whole, flags, tmp_path):
    (tmp_path / "again").mkdir()
    shutil.copy(whole / "step_00000002.pt", tmp_path / "again")
    assert "at step 2" in run("train_ar.py", *flags, "--out", tmp_path / "again").stdout
    assert_equal(final(tmp_path / "again"), final(whole))
    run("train_ar.py", *flags, "--out", tmp_path / "two", processes=2)
    for line, other in zip(log_lines(tmp_path / "two"), log_lines(whole), strict=True):
        assert line == pytest.approx(other, rel=1e-5)


# --- Samples ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    model, tokenizer = ARTransformer(CONFIG), VideoTokenizer(SIZE)
    for head in model.head:  # zero at first: every class and place would look the same
        torch.nn.init.normal_(head.weight, std=0.5)
    return model.eval(), tokenizer.eval()


@pytest.fixture(scope="module")
def files(models, tmp_path_factory):
    """A model's file; the same for single frames; a tokenizer of images; two videos of 7 frames, and one of 2."""
    folder = tmp_path_factory.mktemp("files")
    model, tokenizer = models
    content = {"kind": "ar", "step": 1, "config": dataclasses.asdict(CONFIG), "model": model.state_dict()}
    content["tokenizer"] = {"config": dataclasses.asdict(SIZE), "state": tokenizer.state_dict()}
    content["class_names"] = ["A", "B", "cat"]
    torch.save(content, folder / "model.pt")
    torch.save({**content, "config": {**content["config"], "grid": (1, 4, 4)}}, folder / "single.pt")
    images = Tokenizer(SIZE).state_dict()
    torch.save({"kind": "tokenizer", "config": dataclasses.asdict(SIZE), "tokenizer": images}, folder / "images.pt")
    for name, clip in (("videos/a.webp", GIVEN[0]), ("videos/c/b.webp", GIVEN[1]), ("short/a.webp", GIVEN[0, :, :2])):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(folder / name, clip)
    return {path.stem: str(path) for path in folder.iterdir()}


GIVEN = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 7, 8, 8), np.uint8))


def inside(monkeypatch, *flags):
    """sample.py's main() in this process."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
    sample.main()


def shown(clips):
    """Float clips -> uint8."""
    return (255 * (clips.clamp(-1, 1) + 1) / 2).floor().byte()


@torch.no_grad()
def by_hand(models, labels, options=PAPER_B, kept=None, frames=5, seed=5):
    """Clips (N, T, 8, 8, 3) by the models alone. kept: each one's first tokens (N, t, 4, 4)."""
    model, tokenizer = models
    seeds = [runtime.seed_of(seed, i) for i in range(len(labels))]
    kept = torch.zeros(len(labels), 0, 4, 4, dtype=torch.int64) if kept is None else kept
    windows = []
    for number in range((frames - 2) // 4 + 1):
        drawn = model.generate(torch.tensor(labels), **options, seeds=seeds, given=kept.flatten(1)).view(-1, 3, 4, 4)
        window = shown(tokenizer.decode(torch.cat([kept, drawn[:, kept.shape[1] :]], 1)))
        windows.append(window[:, :, 1 if number else 0 :])
        kept = torch.cat([tokenizer.encode(data.to_float(clip[None, :, 4:])) for clip in window])  # (N, 1, 4, 4)
        seeds = [runtime.seed_of(seed, 1) for seed in seeds]
    return torch.cat(windows, 2)[:, :, :frames].permute(0, 2, 3, 4, 1).numpy()


def test_npz_and_folder_are_the_same_whatever_the_processes_and_the_batch(models, files, tmp_path, monkeypatch):
    flags = ["--model", files["model"], "--count", 7, "--seed", 5]
    run("sample.py", *flags, "--batch", 3, "--out", tmp_path / "two.npz", processes=2)
    for batch in (3, 16):
        inside(monkeypatch, *flags, "--batch", batch, "--out", tmp_path / f"{batch}.npz")
        assert (tmp_path / f"{batch}.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    clips = np.load(tmp_path / "two.npz")["arr_0"]
    assert clips.dtype == np.uint8 and clips.shape == (7, 5, 8, 8, 3)
    np.testing.assert_array_equal(clips, by_hand(models, [0, 1, 2, 0, 1, 2, 0]))
    assert len(np.unique(clips.reshape(35, -1), axis=0)) == 35
    inside(monkeypatch, *flags, "--out", tmp_path / "folder")
    made = sorted((tmp_path / "folder").glob("*.webp"))
    assert [path.name for path in made][1:4] == ["000001_B.webp", "000002_cat.webp", "000003_A.webp"]
    np.testing.assert_array_equal([list(_read_frames(path)) for path in made], clips)
    settings = json.loads((tmp_path / "3.npz.json").read_text())
    assert settings["size"] == "5x8x8" and settings["given_frames"] == 0 and "given_rows" not in settings


@pytest.mark.parametrize("ending", ["webp", "gif", "mp4"])
def test_grid(models, files, tmp_path, monkeypatch, ending):
    """A row a class; with default settings of a grid."""
    if ending == "mp4":
        pytest.importorskip("av")
    out = tmp_path / f"grid.{ending}"
    inside(monkeypatch, "--model", files["model"], "--classes", "cat,A", "--count", 3, "--seed", 5, "--out", out)
    sheet = np.full((5, 18, 18, 3), 230, np.uint8)
    for i, clip in enumerate(by_hand(models, [2, 0, 2], SHOW)):
        top, left = i % 2 * 10, i // 2 * 10
        sheet[:, top : top + 8, left : left + 8] = clip
    write_video(tmp_path / f"expected.{ending}", torch.from_numpy(sheet).movedim(-1, 0))
    frames, expected = (np.stack(list(_read_frames(path))) for path in (out, tmp_path / f"expected.{ending}"))
    np.testing.assert_array_equal(frames, expected)
    assert len(frames) == 5 and (ending != "webp" or np.array_equal(frames, sheet))


@pytest.mark.parametrize("count", [None, 1, 3, 5])
def test_going_on_from_the_first_frames_of_given_videos(models, files, tmp_path, monkeypatch, count):
    """Of 7 frames. Left open, as many a class as there are videos; half of the tokens, rounded down, are one frame's."""
    flags = ["--model", files["model"], "--classes", "B,cat", "--seed", 5, "--given", files["videos"]]
    flags += ["--given-frames", count] if count else []
    inside(monkeypatch, *flags, "--frames", 9, "--out", tmp_path / "x.npz")
    first = data.to_float(GIVEN[[0, 0, 1, 1], :, : count or 1])
    kept = torch.cat([models[1].encode(clip[None]) for clip in first])
    assert kept.shape == (4, ((count or 1) + 1) // 2, 4, 4)
    expected = by_hand(models, [1, 2, 1, 2], kept=kept, frames=9)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npz")["arr_0"], expected)
    assert (expected[:, 1:5] != by_hand(models, [1, 2, 1, 2])[:, 1:]).any((2, 3, 4)).all()
    assert json.loads((tmp_path / "x.npz.json").read_text())["given_frames"] == (count or 1)


def test_longer_and_shorter_clips(models, files, tmp_path, monkeypatch):
    """A window begins with the last frame that the one before shows, encoded alone; the last one may be cut."""
    made = {}
    for frames in (13, 12, 5, 3, 1):
        flags = ["--model", files["model"], "--count", 4, "--batch", 3, "--seed", 5]
        flags += ["--frames", frames] if frames != 5 else []
        inside(monkeypatch, *flags, "--out", tmp_path / f"{frames}.npz")
        made[frames] = np.load(tmp_path / f"{frames}.npz")["arr_0"]
        assert made[frames].shape == (4, frames, 8, 8, 3)
        np.testing.assert_array_equal(made[frames], made[13][:, :frames])
    np.testing.assert_array_equal(made[13], by_hand(models, [0, 1, 2, 0], frames=13))
    np.testing.assert_array_equal(made[5], by_hand(models, [0, 1, 2, 0]))


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--out", "x.png"], r"draws clips, for --out .webp, .gif, .mp4, .npz or a folder$"),
        (["--html"], "--html is of pictures, and this model draws clips$"),
        (["--out", "x.mp4"], "PyAV, .* is not installed"),
        (["--tokenizer", "images"], "one is of videos, the other of images; name the one it was trained with"),
        (["--given", "videos", "--given-rows", 1], "--given is cut by --given-frames, one of 1, 3, 5$"),
        (["--given", "videos", "--given-frames", 2], "--given is cut by --given-frames, one of 1, 3, 5$"),
        (["--given", "videos", "--given-frames", 7], "--given is cut by --given-frames, one of 1, 3, 5$"),
        (["--given", "short", "--given-frames", 3], "it has 2 frames, fewer than 3"),
        (["--given-frames", 1], "--given-rows and --given-frames go with --given"),
        (["--model", "single", "--frames", 2], "--frames 2: this model draws single frames"),
    ],
)
def test_errors(files, tmp_path, monkeypatch, flags, words):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.chdir(tmp_path)
    flags = [files.get(flag, flag) for flag in flags]
    with pytest.raises(UserError, match=words) as error:
        inside(monkeypatch, "--model", files["model"], "--count", 1, "--out", "x.npz", *flags)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
