"""eval_tokenizer.py with a video tokenizer: clips, and whole videos, against plain computations."""

import json
import math
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_files import fill
from PIL import Image
from scripts import fails_with_one_line, run

import eval_tokenizer
import fid
import fvd
from clips import open_clips
from losses import LPIPS
from runtime import UserError
from tokenizer import TokenizerConfig
from video_tokenizer import VideoTokenizer

CONFIG = TokenizerConfig(32, (2, 2, 1), 1, bits=10)  # factor 4, in time too
CLIPS = "moving-glyphs:3:AB"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tokenizer, and the metrics' weights."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = fill(VideoTokenizer(CONFIG)).eval()
    state = {"kind": "tokenizer", "config": vars(CONFIG), "tokenizer": tokenizer.state_dict()}
    torch.save(state, folder / "tokenizer.pt")
    lpips = {network: fill(LPIPS(network), f"{network}.", keep=("shift", "scale")) for network in ("vgg", "alex")}
    for network, module in lpips.items():
        torch.save(module.state_dict(), folder / f"{network}.pt")
    i3d = fill(fvd.I3D(), "i3d.").state_dict()
    torch.save({k: v * 2**0.5 if k.endswith("conv3d.weight") else v for k, v in i3d.items()}, folder / "i3d.pt")
    return SimpleNamespace(folder=folder, tokenizer=tokenizer, lpips=lpips)


@pytest.fixture(autouse=True)
def one_thread():
    """As in the scripts' processes: with more, some convolutions add in another order, and a code may tip over."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def evaluate(files, tmp_path, monkeypatch):
    """Run the script in this process, without LPIPS; returns what it wrote."""

    def absent(*_):
        raise UserError("no network")

    def call(*flags):
        words = ["eval_tokenizer.py", "--tokenizer", files.folder / "tokenizer.pt", "--data", CLIPS, "--size", 16]
        words += ["--frames", 5, "--workers", 0, "--batch", 2, "--out", tmp_path / "out", *flags]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        eval_tokenizer.main()
        return json.loads((tmp_path / "out" / "metrics.json").read_text())

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(eval_tokenizer, "load_lpips", absent)
    return call


def levels(z):
    """Float, clamped -> uint8, truncated."""
    return (255 * (z.clamp(-1, 1) + 1) / 2).to(torch.uint8)


@torch.no_grad()
def rebuilt_one_by_one(tokenizer, clip):
    """uint8 (3, T, S, S), windows of 17 -> (float, clamped (3, T, S, S), all indices)."""
    x, windows, codes = clip[None] / 127.5 - 1, [], []
    for start in range(0, x.shape[2], 17):
        window = x[:, :, start : start + 17]
        frames = window.shape[2]
        while (window.shape[2] - 1) % 4:
            window = torch.cat([window, window[:, :, -1:]], 2)
        y, indices, _ = tokenizer(window)
        assert y.shape == window.shape
        windows.append(y[0, :, :frames])
        codes.append(indices.flatten())
    return torch.cat(windows, 1).clamp(-1, 1), torch.cat(codes)


def scores(files, clip, y):
    """PSNR, SSIM, LPIPS VGG, LPIPS AlexNet of each frame, one by one."""
    rows = []
    for t in range(clip.shape[1]):
        image, frame = clip[None, :, t], y[None, :, t]
        error = ((image.double() - levels(frame).double()) / 255).square().mean().item()
        distances = [lpips(image / 127.5 - 1, frame).item() for lpips in files.lpips.values()]
        rows.append([-10 * math.log10(error), fid.ssim(image, levels(frame)).item(), *distances])
    return rows


NAMES = ["PSNR", "SSIM", "LPIPS VGG", "LPIPS AlexNet"]


def test_every_number_on_one_process_and_two(files, tmp_path):
    flags = ["--tokenizer", files.folder / "tokenizer.pt", "--data", "moving-glyphs:2", "--size", 32, "--frames", 9]
    flags += ["--batch", 1, "--workers", 0, "--i3d", files.folder / "i3d.pt", "--out", tmp_path]
    flags += ["--lpips-vgg", files.folder / "vgg.pt", "--lpips-alex", files.folder / "alex.pt"]
    found = []
    for processes in 1, 2:
        words = run("eval_tokenizer.py", *flags, processes=processes).stdout
        found.append(json.loads((tmp_path / "metrics.json").read_text()))
    del found[0]["protocol"], found[1]["protocol"]["device"]
    protocol = found[1].pop("protocol")
    assert found[0] == found[1]
    found = found[0]
    assert list(found) == [
        *("clips", "rFVD", "rFVD published", *NAMES, "codebook use", "bits per pixel", "notes")
    ]  # no published PSNR

    dataset = open_clips("moving-glyphs:2", 32, 9, labelled=False)
    clips = torch.stack([dataset[0, index][0] for index in range(2)])
    rebuilt, codes = zip(*(rebuilt_one_by_one(files.tokenizer, clip) for clip in clips))
    means = np.mean([scores(files, *pair) for pair in zip(clips, rebuilt)], (0, 1))
    for name, mean in zip(NAMES, means, strict=True):
        assert found[name] == pytest.approx(mean, rel=1e-5), name
    used = len(torch.cat(codes).unique())
    assert 1 < used < 2**10 and found["codebook use"] == used / 2**10
    assert found["clips"] == 2 and found["bits per pixel"] == 10 * 3 * 8 * 8 / (9 * 32 * 32)

    # The originals go as the reconstructions do: grey levels 1 to 63 become one lower.
    sets = {
        "originals": clips - ((clips >= 1) & (clips <= 63)).byte(),
        "rebuilt": torch.stack(list(map(levels, rebuilt))),
    }
    assert not torch.equal(sets["originals"], clips)
    for name, clip in sets.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=clip.movedim(1, -1))
    paths = [tmp_path / f"{name}.npz" for name in sets]
    run("fvd.py", *paths, "--i3d", files.folder / "i3d.pt", "--json", tmp_path / "fvd.json", "--batch", 1)
    truth = json.loads((tmp_path / "fvd.json").read_text())
    assert found["rFVD"] == pytest.approx(truth["FVD"], rel=1e-9) and truth["FVD"] > 0
    assert found["rFVD published"] == pytest.approx(truth["FVD published"], rel=1e-9)

    sha256 = truth["protocol"]["I3D"].split(";")[0]
    assert protocol["I3D"] == sha256 and protocol["clips"].endswith("random crop 32x32, 9 frames")
    for text in ("truncated", sha256, "cpu x 2", f"{used} of 1024 codes", "biased upwards: fewer than 2048 clips"):
        assert text in words
    # The first clip alone, as the batch is of one: frames 0, 4, 8 above those that came back, two pixels between.
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "reconstructions.png"))).permute(2, 0, 1)
    assert sheet.shape == (3, 66, 100)
    for column, t in enumerate((0, 4, 8)):
        left = 34 * column
        assert torch.equal(sheet[:, :32, left : left + 32], clips[0, :, t])
        assert torch.equal(sheet[:, 34:, left : left + 32], levels(rebuilt[0][:, t]))


def test_what_is_shown_of_several_clips(evaluate, files, tmp_path):
    """At most 8 frames of a clip, every fourth, in a row; below it what came back."""
    evaluate("--frames", 41)
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "out" / "reconstructions.png"))).permute(2, 0, 1)
    assert sheet.shape == (3, 4 * 18 - 2, 8 * 18 - 2)
    dataset = open_clips(CLIPS, 16, 41, labelled=False)
    for number in range(2):
        for column in range(8):
            frame = sheet[:, 36 * number :, 18 * column :][:, :16, :16]
            assert torch.equal(frame, dataset[0, number][0][:, 4 * column])


def test_without_networks_the_rest_is_measured(evaluate, tmp_path, capsys):
    found = evaluate("--frames", 9)
    missing = f"not computed (there is no {tmp_path / 'hub' / 'checkpoints' / 'i3d_pretrained_400.pt'}"
    assert found["rFVD"].startswith(missing) and found["rFVD published"] == found["rFVD"]
    assert found["LPIPS VGG"] == "not computed (no network)" and found["PSNR"] > 0
    assert f"{'rFVD published':<15} not computed" in capsys.readouterr().out


def test_clips_too_short_or_too_few_for_the_distance(evaluate, files):
    found = evaluate("--frames", 8, "--i3d", files.folder / "i3d.pt")
    reason = "not computed (it is of two clips or more, of one length, 9 frames or more)"
    assert found["rFVD"] == found["rFVD published"] == reason
    assert found["bits per pixel"] == 10 * 3 * 4 * 4 / (8 * 16 * 16)  # all 8 frames come back, of 3 times 4 x 4 tokens
    assert evaluate("--data", "moving-glyphs:1", "--frames", 9, "--i3d", files.folder / "i3d.pt")["rFVD"] == reason


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 4, 16, 17, 18, 40])
def test_videos_of_any_length_come_back_whole(files, frames):
    clips = torch.randint(256, (2, 3, frames, 16, 24), dtype=torch.uint8)
    y, indices = files.tokenizer.rebuild(clips / 127.5 - 1)
    assert y.shape == clips.shape
    for clip, ours, codes in zip(clips, y, indices):
        truth, truth_codes = rebuilt_one_by_one(files.tokenizer, clip)
        assert torch.equal(codes.flatten(), truth_codes)
        assert torch.allclose(ours.clamp(-1, 1), truth, atol=1e-5)
    if frames == 17:
        assert torch.equal(y, files.tokenizer(clips / 127.5 - 1)[0])


@torch.no_grad()
def test_windows_of_other_lengths(files):
    """Of 6 frames, each padded to 9 and cut, the last of 3 to 5."""
    x = torch.rand(1, 3, 15, 8, 8) * 2 - 1
    y, indices = files.tokenizer.rebuild(x, frames=6)
    numbers = [*range(6), 5, 5, 5], [*range(6, 12), 11, 11, 11], [12, 13, 14, 14, 14]
    parts = [files.tokenizer(x[:, :, window]) for window in numbers]
    assert torch.equal(y, torch.cat([part[0][:, :, :n] for part, n in zip(parts, (6, 6, 3))], 2))
    assert torch.equal(indices, torch.cat([part[1] for part in parts], 1))


def videos(folder):
    """Videos of unequal lengths and shapes, as folders of frames; {name: frames}, in order."""
    lengths = {"a": 1, "b/a.long": 40, "c": 18}
    rng = np.random.default_rng(0)
    for number, (name, length) in enumerate(lengths.items()):
        (folder / name).mkdir(parents=True)
        for frame in range(length):
            noise = rng.normal(128, 40, (36, 32 + 2 * number, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noise).save(folder / name / f"{frame:03}.png")
    return lengths


def read_webp(path):
    with Image.open(path) as picture:
        frames = [np.asarray((picture.seek(i), picture.convert("RGB"))[1]) for i in range(picture.n_frames)]
    return torch.from_numpy(np.stack(frames)).movedim(-1, 0)


def test_whole_videos_on_one_process_and_two(files, tmp_path):
    lengths = videos(tmp_path / "videos")
    flags = ["--tokenizer", files.folder / "tokenizer.pt", "--data", tmp_path / "videos", "--size", 32, "--batch", 7]
    flags += ["--frames", "all", "--workers", 0, "--i3d", files.folder / "i3d.pt"]
    flags += ["--lpips-vgg", files.folder / "vgg.pt", "--lpips-alex", files.folder / "alex.pt"]
    found = []
    for processes in 1, 2:
        out = tmp_path / str(processes)
        run("eval_tokenizer.py", *flags, "--out", out, "--save-pictures", out / "saved", processes=processes)
        found.append(json.loads((out / "metrics.json").read_text()))
    protocol = found[0].pop("protocol")
    del found[1]["protocol"]
    assert found[0] == found[1]
    found = found[0]

    dataset, rows, tokens = open_clips(tmp_path / "videos", 32, None, labelled=False), [], 0
    for index, (name, length) in enumerate(lengths.items()):
        assert dataset.name(index) == name
        clip = dataset[0, index][0]
        y, codes = rebuilt_one_by_one(files.tokenizer, clip)
        assert clip.shape[1] == length
        rows += scores(files, clip, y)
        tokens += len(codes)
        for out in "1", "2":  # a.long becomes a.webp
            saved = (tmp_path / out / "saved" / name).with_suffix(".webp")
            assert torch.equal(read_webp(saved), levels(y))
    assert len(rows) == 59
    for name, mean in zip(NAMES, np.mean(rows, 0), strict=True):
        assert found[name] == pytest.approx(mean, rel=1e-5), name
    assert tokens == 64 * (1 + 5 + 5 + 3 + 5 + 1)
    assert found["clips"] == 3 and found["bits per pixel"] == 10 * tokens / (59 * 32 * 32)
    assert found["rFVD"] == "not computed (it is of two clips or more, of one length, 9 frames or more)"
    assert "over frames" in found["notes"]["PSNR"] and protocol["clips"].endswith(", all frames")
    assert json.loads((tmp_path / "1" / "config.json").read_text())["batch"] == 1


def test_a_long_video_is_scored_in_parts(evaluate, files, tmp_path):
    (tmp_path / "videos" / "a").mkdir(parents=True)
    for frame in range(300):
        Image.effect_noise((8, 8), frame).convert("RGB").save(tmp_path / "videos" / "a" / f"{frame:03}.png")
    found = evaluate("--data", tmp_path / "videos", "--size", 8, "--frames", "all")
    clip = open_clips(tmp_path / "videos", 8, None, labelled=False)[0, 0][0]
    y, _ = rebuilt_one_by_one(files.tokenizer, clip)
    error = ((clip.double() - levels(y).double()) / 255).square().mean((0, 2, 3))
    assert found["PSNR"] == pytest.approx((-10 * error.log10()).mean().item(), rel=1e-6)


def test_saved_clips(evaluate, files, tmp_path):
    evaluate("--save-pictures", tmp_path / "saved")
    evaluate("--save-pictures", tmp_path / "saved", "--video-format", "gif", "--rounding")
    assert sorted(os.listdir(tmp_path / "saved")) == [f"glyph {i}.{kind}" for i in range(3) for kind in ("gif", "webp")]
    clips = open_clips(CLIPS, 16, 5, labelled=False)
    for index in 0, 2:
        y, _ = rebuilt_one_by_one(files.tokenizer, clips[0, index][0])
        frames = read_webp(tmp_path / "saved" / f"glyph {index}.webp")
        assert torch.equal(frames, levels(y))
        with Image.open(tmp_path / "saved" / f"glyph {index}.gif") as gif:
            assert gif.n_frames == 5
    pytest.importorskip("av")
    evaluate("--save-pictures", tmp_path / "mp4", "--video-format", "mp4")
    back = open_clips(tmp_path / "mp4", 16, None, labelled=False)
    assert len(back) == 3 and back[0, 0][0].shape == (3, 5, 16, 16)


def test_what_the_user_gets_wrong(evaluate, files, tmp_path):
    videos(tmp_path / "videos")
    of_videos = "is a tokenizer of videos: give their side as --size, and no --html"
    for flags, words in [
        (["--size", 18], "--size 18 is not a multiple of 4"),
        (["--size", "original"], of_videos),
        (["--html"], of_videos),
        (["--data", "glyphs:5"], "no picture folder glyphs:5"),
        (["--data", "moving-glyphs", "--frames", "all"], "moving glyphs never end"),
        (["--data", tmp_path / "videos", "--frames", 50], "fewer than 50"),
        (["--data", tmp_path / "videos", "--save-pictures", tmp_path / "videos"], "would write among --data"),
        (["--frames", 9, "--i3d", "absent.pt"], "no file absent.pt"),
        (["--frames", 9, "--i3d", files.folder / "vgg.pt"], "does not hold the I3D network"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            evaluate(*flags)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()  # nothing half-written
    flags = ["--tokenizer", files.folder / "tokenizer.pt"]
    line = fails_with_one_line("eval_tokenizer.py", *flags, "--frames", "some")
    assert "argument --frames: invalid int or 'all' value: 'some'" in line
    assert "argument --frames: must be at least 1" in fails_with_one_line("eval_tokenizer.py", *flags, "--frames", 0)
    assert "argument --video-format" in fails_with_one_line("eval_tokenizer.py", *flags, "--video-format", "avi")
    assert of_videos in fails_with_one_line("eval_tokenizer.py", *flags, "--html")
