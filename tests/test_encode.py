import importlib.util
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import fails_with_one_line, run, start

import checkpoint
import data
import encode
from clips import open_clips, write_video
from runtime import UserError
from tokenizer import Tokenizer, TokenizerConfig, load_tokenizer
from video_tokenizer import VideoTokenizer

# ----------------------------------------------------------------------------------------------------------------------
# The cache's folder: CodeWriter and data.open_codes

SETTINGS = {
    "tokenizer_hash": "abc",
    "bits": 18,
    "grid": [2, 3],
    "size": 32,
    "crops": 2,
    "seed": 0,
    "classes": ["x", "y"],
    "count": 9,
    "source": "somewhere",
}
CODES = np.random.default_rng(0).integers(0, 2**18, (9, 2, 6))
LABELS = np.arange(9) % 2


def fill_rows(writer, rows):
    writer.write(rows, CODES[rows], LABELS[rows])


def complete_cache(folder):
    writer = encode.CodeWriter(folder, SETTINGS)
    fill_rows(writer, [0, 1, 2, 4, 5, 6, 7, 8])
    writer.write_unreadable([3])
    writer.finish()
    return folder


def content(folder):
    return {name: (folder / name).read_bytes() for name in ("codes.bin", "labels.bin", "manifest.json")}


def test_cache_round_trip(tmp_path):
    codes = data.open_codes(complete_cache(tmp_path / "a" / "cache"))
    readable = [0, 1, 2, 4, 5, 6, 7, 8]
    assert len(codes) == 8 and codes.rows.tolist() == readable and codes.labels.tolist() == [0, 1, 0, 0, 1, 0, 1, 0]
    assert codes.classes == ["x", "y"] and codes.grid == (2, 3) and codes.manifest["tokenizer_hash"] == "abc"
    assert codes.codes.shape == (9, 2, 6) and (codes.codes[readable] == CODES[readable]).all()
    on_file = np.frombuffer((tmp_path / "a" / "cache" / "labels.bin").read_bytes(), "<i4")
    assert on_file.tolist() == [0, 1, 0, -1, 0, 1, 0, 1, 0]

    entries = data.SampleOrder(8, seed=0).at(0, 80)
    indices, labels = codes.batch(entries, seed=1)
    assert indices.dtype == labels.dtype == torch.int64 and indices.shape == (80, 6)
    assert labels.tolist() == [LABELS[readable[i]] for _, i in entries]
    crops = []
    for row, (_, i) in zip(indices.numpy(), entries):
        crops += [crop for crop in (0, 1) if (row == CODES[readable[i], crop]).all()]
    assert len(crops) == 80 and 20 < sum(crops) < 60
    assert torch.equal(codes.batch(entries[30:50], seed=1)[0], indices[30:50])
    assert not torch.equal(codes.batch(entries, seed=2)[0], indices)


def test_a_cache_goes_on_after_a_stop(tmp_path):
    expected = content(complete_cache(tmp_path / "whole"))
    writer = encode.CodeWriter(tmp_path / "cut", SETTINGS)
    fill_rows(writer, [5, 0])
    writer.write_unreadable([3])
    with pytest.raises(UserError, match="incomplete: finish it by running encode.py again"):
        data.open_codes(tmp_path / "cut")
    with pytest.raises(UserError, match="not finished"):
        writer.finish()
    writer = encode.CodeWriter(tmp_path / "cut", SETTINGS | {"source": "moved"})
    todo = np.flatnonzero(writer.labels() < 0).tolist()
    assert todo == [1, 2, 3, 4, 6, 7, 8] and not writer.manifest["complete"]  # 3 gets another chance
    fill_rows(writer, [1, 2, 4, 6, 7, 8])
    writer.finish()
    assert content(tmp_path / "cut") == expected
    assert encode.CodeWriter(tmp_path / "cut", SETTINGS).manifest["complete"]


def test_codes_that_have_lost_their_manifest_are_not_thrown_away(tmp_path):
    complete_cache(tmp_path)
    (tmp_path / "manifest.json").unlink()
    before = (tmp_path / "codes.bin").read_bytes()
    with pytest.raises(UserError, match="holds codes, but no manifest.json"):
        encode.CodeWriter(tmp_path, SETTINGS)
    assert (tmp_path / "codes.bin").read_bytes() == before
    (tmp_path / "labels.bin").unlink()  # a creation that was cut off: nothing was encoded
    assert not encode.CodeWriter(tmp_path, SETTINGS).manifest["complete"]


def test_two_writers_make_the_same_files_as_one(tmp_path):
    expected = content(complete_cache(tmp_path / "one"))
    writers = [encode.CodeWriter(tmp_path / "two", SETTINGS) for _ in range(2)]
    for a, b in ([0, 8], [2, 7], [4, 6], [5, 1]):
        fill_rows(writers[0], [a])
        fill_rows(writers[1], [b])
    writers[1].write_unreadable([3])
    writers[0].finish()
    assert content(tmp_path / "two") == expected


def test_a_label_is_set_only_after_its_codes(tmp_path, monkeypatch):
    writer = encode.CodeWriter(tmp_path, SETTINGS)

    def no_space(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)  # the codes do not reach the disk
    with pytest.raises(OSError):
        fill_rows(writer, [1])
    assert (writer.labels() == data.PENDING).all()


@pytest.mark.parametrize(
    "name, value", [("tokenizer_hash", "def"), ("crops", 0), ("seed", 1), ("count", 8), ("classes", ["x", "z"])]
)
def test_a_cache_made_otherwise_is_refused(tmp_path, name, value):
    complete_cache(tmp_path)
    before = content(tmp_path)
    with pytest.raises(UserError, match=f"made with {name} .*give another --out"):
        encode.CodeWriter(tmp_path, SETTINGS | {name: value})
    assert content(tmp_path) == before


def test_damaged_and_foreign_caches_are_refused(tmp_path):
    with pytest.raises(UserError, match="is not a code cache"):
        data.open_codes(tmp_path)
    (tmp_path / "manifest.json").write_text('{"cut sho')
    with pytest.raises(UserError, match="is not a code cache"):
        data.open_codes(tmp_path)
    (tmp_path / "manifest.json").unlink()
    complete_cache(tmp_path)
    for name in ("codes.bin", "labels.bin"):
        whole = (tmp_path / name).read_bytes()
        for wrong in (whole[:-4], whole + b"1234"):
            (tmp_path / name).write_bytes(wrong)
            with pytest.raises(UserError, match=f"{name} has {len(wrong)} bytes.*damaged"):
                data.open_codes(tmp_path)
            with pytest.raises(UserError, match="damaged"):
                encode.CodeWriter(tmp_path, SETTINGS)
        (tmp_path / name).write_bytes(whole)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"version": 2}))
    with pytest.raises(UserError, match="newer version"):
        data.open_codes(tmp_path)
    wrongs = [{"crops": None}, {"version": "one"}, {"grid": [4]}, {"grid": [2, 3, 1]}, {"grid": 6}, {"count": -9}]
    wrongs += [{"count": 10**30}, {"count": 9.0}, {"classes": "xy"}, {"classes": [1, 2]}, {"classes": []}]
    wrongs += [{"frames": 5}, {"frames": 5, "grid": [6]}] + [{"frames": n, "grid": [3, 2, 1]} for n in (0, "5", None)]
    for wrong in [*wrongs, {"bits": 99}, {"bits": "18"}]:
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | wrong))
        with pytest.raises(UserError, match="manifest.json is not a code cache's manifest"):
            data.open_codes(tmp_path)


def test_a_manifest_that_cannot_be_read_is_not_an_absent_one(tmp_path, monkeypatch):
    complete_cache(tmp_path)

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    for open_it in (data.open_codes, lambda folder: encode.CodeWriter(folder, SETTINGS)):
        with pytest.raises(UserError, match="cannot read .*manifest.json: Permission denied"):
            open_it(tmp_path)


def test_labels_of_classes_that_are_not_there(tmp_path):
    complete_cache(tmp_path)
    for wrong in (LABELS * 0 + 2, LABELS * 0 - 3, LABELS * 0 - 1):
        wrong.astype(np.int32).tofile(tmp_path / "labels.bin")
        with pytest.raises(UserError, match="labels.bin names no picture, or classes"):
            data.open_codes(tmp_path)


def test_a_cache_is_not_written_through_links(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "cache"
    folder.mkdir()
    victim.write_bytes(b"mine")
    for name in ("codes.bin", "labels.bin"):
        (folder / name).symlink_to(victim)
    complete_cache(folder)
    assert victim.read_bytes() == b"mine" and not (folder / "codes.bin").is_symlink()
    os.rename(folder / "codes.bin", victim)
    (folder / "codes.bin").symlink_to(victim)
    before = victim.read_bytes()
    with pytest.raises(OSError, match="symbolic links"):
        encode.CodeWriter(folder, SETTINGS).write([0], CODES[[1]], LABELS[[1]])
    assert victim.read_bytes() == before


def test_a_cache_that_cannot_fit_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match="GiB free"):
        encode.CodeWriter(tmp_path, SETTINGS | {"count": 10**15})
    assert not any(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# The script

CONFIG = TokenizerConfig(channels=32, channel_multipliers=(1, 1), blocks_per_level=1, bits=8)
VIDEO_CONFIG = TokenizerConfig(channels=32, channel_multipliers=(2, 1), blocks_per_level=1, bits=8)  # halves time, too


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """A tiny tokenizer whose moving average differs from its weights."""
    return tokenizer_in(tmp_path_factory.mktemp("tokenizer"), Tokenizer, CONFIG)


@pytest.fixture(scope="module")
def video_tokenizer_file(tmp_path_factory):
    return tokenizer_in(tmp_path_factory.mktemp("video_tokenizer"), VideoTokenizer, VIDEO_CONFIG)


def tokenizer_in(folder, network, config):
    torch.manual_seed(0)
    state, average = network(config).state_dict(), network(config).state_dict()
    content = {"kind": "tokenizer", "config": asdict(config), "tokenizer": state, "tokenizer_ema": average}
    checkpoint.write_atomically(folder / "tokenizer.pt", content)
    return folder / "tokenizer.pt"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """101 pictures of two classes, 30x20, one of them (b/099.png, the last but one) unreadable."""
    folder = make_pictures(tmp_path_factory.mktemp("pictures"), 101)
    (folder / "b" / "099.png").write_bytes(b"no picture")
    return folder


def make_pictures(folder, count):
    random = np.random.default_rng(0)
    for i in range(count):
        path = folder / "ab"[i % 2 or i == 100] / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        levels = np.repeat(np.repeat(random.integers(0, 256, (5, 6, 3), dtype=np.uint8), 4, 0), 5, 1)
        Image.fromarray(levels).save(path)
    return folder


def flags(tokenizer_file, source, out, *more):
    flags = ["--tokenizer", tokenizer_file, "--data", source, "--out", out, "--size", 16, "--workers", 0]
    return [str(flag) for flag in (*flags, *more)]


@pytest.fixture
def encode_here(monkeypatch, capsys):
    """encode.py's main() in this process: returns what it printed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def encode_it(*arguments):
        monkeypatch.setattr(sys, "argv", ["encode.py", *flags(*arguments)])
        encode.main()
        return capsys.readouterr().out

    yield encode_it
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_codes_are_the_tokenizers_and_two_processes_make_the_same_files(tokenizer_file, pictures, tmp_path):
    # Shares of 51 and 50 pictures: one rank makes a sixth round, of one picture, and the other has none then.
    done = run("encode.py", *flags(tokenizer_file, pictures, tmp_path / "one", "--batch", 10))
    more = ["--batch", 10, "--workers", 1]
    run("encode.py", *flags(tokenizer_file, pictures, tmp_path / "two", *more), processes=2)
    assert "101 pictures, 101 images" in done.stdout and "unreadable pictures: 1" in done.stdout
    assert "b/099.png" in done.stderr
    assert content(tmp_path / "one") == content(tmp_path / "two")

    codes = data.open_codes(tmp_path / "one")
    assert len(codes) == 100 and codes.classes == ["a", "b"] and codes.grid == (8, 8)
    tokenizer = load_tokenizer(tokenizer_file, ema=True)
    dataset = data.open_pictures(pictures, 16, train=False)
    assert 99 not in codes.rows and dataset.name(99) == "b/099.png"
    for row in (0, 57, 100):
        image, label = dataset[0, row]
        expected = tokenizer.encode(data.to_float(image[None])).flatten()
        place = codes.rows.tolist().index(row)
        found, found_label = codes.batch([(0, place)], seed=0)
        assert torch.equal(found[0], expected) and found_label.tolist() == [label]
    share = len(np.unique(codes.codes[codes.rows])) / 2**8
    assert f"codes used {share:.2%}" in done.stdout

    kept = checkpoint.read_weights(tmp_path / "one" / "tokenizer.pt")
    assert kept["kind"] == "tokenizer" and "tokenizer_ema" not in kept
    again = load_tokenizer(tmp_path / "one" / "tokenizer.pt")
    assert again.config == CONFIG
    for name, value in tokenizer.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_a_complete_cache_is_left_alone(tokenizer_file, pictures, tmp_path, encode_here):
    encode_here(tokenizer_file, pictures, tmp_path)
    before = content(tmp_path)
    assert "already complete: 101 pictures" in encode_here(tokenizer_file, pictures, tmp_path)
    for changed, name in [("--raw", "tokenizer_hash"), ("--crops=2", "crops"), ("--precision=bf16", "precision")]:
        with pytest.raises(UserError, match=f"made with .*{name}"):
            encode_here(tokenizer_file, pictures, tmp_path, changed)
    os.rename(pictures / "a" / "000.png", pictures / "a" / "0000.png")
    try:
        with pytest.raises(UserError, match="picture_names_hash"):
            encode_here(tokenizer_file, pictures, tmp_path)
    finally:
        os.rename(pictures / "a" / "0000.png", pictures / "a" / "000.png")
    assert content(tmp_path) == before


@pytest.mark.parametrize("batch", [2, 7])  # fewer than the crops of a picture; more, and no multiple of them
def test_random_crops(tokenizer_file, tmp_path, encode_here, batch):
    pictures, out = make_pictures(tmp_path / "pictures", 9), tmp_path / "out"
    output = encode_here(tokenizer_file, pictures, out, "--crops", 3, "--batch", batch, "--seed", 5, "--raw")
    assert "9 pictures, 27 images" in output
    codes = data.open_codes(out)
    assert codes.labels.tolist() == [0] * 5 + [1] * 4
    tokenizer = load_tokenizer(tokenizer_file, ema=False)
    dataset = data.open_pictures(pictures, 16, train=True, seed=5)
    for crop in range(3):
        expected = tokenizer.encode(data.to_float(dataset[crop, 7][0][None])).flatten()
        assert codes.codes[7, crop].tolist() == expected.tolist()
    assert not (codes.codes[codes.rows, 0] == codes.codes[codes.rows, 1]).all()


@pytest.mark.parametrize(
    "kind, source, stops",
    [
        ("tokenizer_file", "glyphs:500:ABC", {signal.SIGTERM: "asked", signal.SIGKILL: "killed"}),
        ("video_tokenizer_file", "moving-glyphs:100:ABC", {signal.SIGKILL: "killed"}),
    ],
)
def test_stopped_anywhere_the_same_command_goes_on(kind, source, stops, request, tmp_path, encode_here):
    tokenizer_file, frames = request.getfixturevalue(kind), ["--frames", 3] * (kind == "video_tokenizer_file")
    count, what = int(source.split(":")[1]), "videos" if frames else "pictures"
    encode_here(tokenizer_file, source, tmp_path / "whole", *frames)
    for number, folder in stops.items():
        folder = tmp_path / folder
        script = start("encode.py", *flags(tokenizer_file, source, folder, "--batch", 2, "--workers", 1, *frames))
        deadline = time.monotonic() + 60
        while not (
            (folder / "manifest.json").exists() and (np.fromfile(folder / "labels.bin", np.int32) >= 0).sum() >= 10
        ):
            assert time.monotonic() < deadline and script.poll() is None, script.communicate()
            time.sleep(0.005)
        os.killpg(script.pid, number)  # a batch system's signal goes to the loader's worker too
        output, errors = script.communicate(timeout=120)
        done = (np.fromfile(folder / "labels.bin", np.int32) >= 0).sum()
        assert 10 <= done < count, "it was not stopped midway"
        if number == signal.SIGTERM:
            assert script.returncode == 0 and errors == "" and f"stopped after {done} of {count}" in output
        assert f"{count - done} of {count} {what} to do" in encode_here(tokenizer_file, source, folder, *frames)
        assert content(folder) == content(tmp_path / "whole")


def test_codes_of_moving_glyphs(video_tokenizer_file, tmp_path):
    source, more = "moving-glyphs:9:ABC", ["--frames", 5, "--batch", 2]
    done = run("encode.py", *flags(video_tokenizer_file, source, tmp_path / "one", *more))
    run("encode.py", *flags(video_tokenizer_file, source, tmp_path / "two", *more, "--workers", 1), processes=2)
    assert "9 of 9 videos, 9 clips" in done.stdout and "unreadable videos: none" in done.stdout
    assert content(tmp_path / "one") == content(tmp_path / "two")
    codes = data.open_codes(tmp_path / "one")
    assert codes.grid == (3, 8, 8) and codes.manifest["frames"] == 5 and codes.labels.tolist() == [0, 1, 2] * 3
    tokenizer = load_tokenizer(video_tokenizer_file)
    dataset = open_clips(source, 16, 5, train=True)
    for row in (0, 5, 8):
        expected = tokenizer.encode(data.to_float(dataset[0, row][0][None])).flatten(1)
        assert torch.equal(codes.batch([(0, row)], seed=0)[0], expected)
    again = load_tokenizer(tmp_path / "one" / "tokenizer.pt")
    assert isinstance(again, VideoTokenizer) and again.config == VIDEO_CONFIG
    assert checkpoint.hash_of(again.state_dict()) == codes.manifest["tokenizer_hash"]


@pytest.mark.parametrize("crops", [0, 3])
def test_codes_of_videos(video_tokenizer_file, tmp_path, encode_here, crops):
    random = np.random.default_rng(0)
    source, count = tmp_path / "videos", 9
    for i, ending in enumerate(["webp", "gif"] + ["mp4"] * (importlib.util.find_spec("av") is not None)):
        folder = source / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        clip = random.integers(0, 256, (3, count + i, 5, 6), dtype=np.uint8).repeat(4, 2).repeat(5, 3)
        write_video(folder / f"{ending}.{ending}", torch.from_numpy(clip))
    (source / "b" / "frames").mkdir()
    for i in range(count):
        picture = Image.fromarray(random.integers(0, 256, (18, 20, 3), dtype=np.uint8))
        picture.save(source / "b" / "frames" / f"{i}.png")
    output = encode_here(video_tokenizer_file, source, tmp_path / "out", "--frames", 5, "--crops", crops, "--seed", 4)
    dataset = open_clips(source, 16, 5, train=crops > 0, seed=4)
    assert f"{len(dataset)} of {len(dataset)} videos, {len(dataset) * max(1, crops)} clips" in output
    codes = data.open_codes(tmp_path / "out")
    assert len(codes) == len(dataset) and codes.codes.shape[1:] == (max(1, crops), 3 * 8 * 8)
    assert codes.classes == ["a", "b"] and codes.labels.tolist() == dataset.labels.tolist()
    tokenizer = load_tokenizer(video_tokenizer_file)
    for row in range(len(dataset)):
        for crop in range(max(1, crops)):
            expected = tokenizer.encode(data.to_float(dataset[crop, row][0][None])).flatten()
            assert codes.codes[row, crop].tolist() == expected.tolist()
    assert crops == 0 or not (codes.codes[:, 0] == codes.codes[:, 1]).all()
    with pytest.raises(
        UserError, match=r"made with grid \[3, 8, 8\], not \[2, 8, 8\].*; frames 5, not 3: give another"
    ):
        encode_here(video_tokenizer_file, source, tmp_path / "out", "--frames", 3, "--crops", crops, "--seed", 4)


def test_a_video_of_which_some_clips_can_be_read_is_left_out(video_tokenizer_file, tmp_path, encode_here):
    for video in range(100):
        (tmp_path / "v" / f"{video:02}").mkdir(parents=True)
        for frame in range(2):
            Image.new("RGB", (16, 16), (video, frame, 0)).save(tmp_path / "v" / f"{video:02}" / f"{frame}.png")
    (tmp_path / "v" / "40" / "1.png").write_bytes(b"")
    dataset = open_clips(tmp_path / "v", 16, 1, train=True, labelled=False)
    readable = [len(data.read_batch(dataset, [(crop, 40)]).images) for crop in range(5)]
    assert set(readable) == {0, 1}
    batch = data.read_batch(dataset, [(crop, index) for index in (40, 41) for crop in range(5)])
    assert list(batch.unreadable) == [40] and batch.indices.tolist() == [41] * 5
    more = ["--frames", 1, "--crops", 5, "--batch", 35, "--unlabelled"]
    assert "unreadable videos: 1\n" in encode_here(video_tokenizer_file, tmp_path / "v", tmp_path / "out", *more)
    codes = data.open_codes(tmp_path / "out")
    assert codes.rows.tolist() == [i for i in range(100) if i != 40] and (codes.codes[40] == 0).all()


def test_a_picture_of_a_cache_says_nothing_of_frames(tokenizer_file, tmp_path, encode_here):
    """Or caches of before would not be gone on with."""
    encode_here(tokenizer_file, "glyphs:2:A", tmp_path)
    names = "format version tokenizer_hash bits grid size crops seed precision classes count picture_names_hash source"
    assert list(json.loads((tmp_path / "manifest.json").read_text())) == [*names.split(), "complete"]


def test_seventeen_frames_are_the_default(video_tokenizer_file, tmp_path, encode_here):
    encode_here(video_tokenizer_file, "moving-glyphs:2:A", tmp_path)
    assert data.open_codes(tmp_path).grid == (9, 8, 8) and data.open_codes(tmp_path).manifest["frames"] == 17


def test_a_wrong_path_is_one_line_and_exit_code_2(tokenizer_file, tmp_path):
    wrong = flags(tokenizer_file, tmp_path / "none", tmp_path / "out")
    assert "there is no picture folder" in fails_with_one_line("encode.py", *wrong)
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_said_before_anything_is_written(
    tokenizer_file, video_tokenizer_file, pictures, tmp_path, encode_here
):
    for source, flag, words in [
        (pictures, "--tokenizer=none.pt", "there is no file or folder none.pt"),
        (pictures, "--size=17", "--size 17 is not a multiple of 2"),
        ("glyphs:9", "--crops=2", "leave --crops out"),
        (pictures, "--frames=5", "is a tokenizer of images: leave --frames out"),
    ]:
        with pytest.raises(UserError, match=words):
            encode_here(tokenizer_file, source, tmp_path / "out", flag)
    for more, words in [
        (["--frames=4"], "^--frames 4 is not 1 more than a multiple of 2: the last would be lost$"),
        (["--size=17"], "--size 17 is not a multiple of 2"),
        (["--crops=2"], "leave --crops out"),
    ]:
        with pytest.raises(UserError, match=words):
            encode_here(video_tokenizer_file, "moving-glyphs:9", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_too_many_unreadable_pictures_stop_it(tokenizer_file, tmp_path, encode_here):
    for i in range(6):
        Image.new("RGB", (16, 16)).save(tmp_path / f"{i}.png")
    (tmp_path / "4.png").write_bytes(b"")
    with pytest.raises(UserError, match="more than 1% of the 6 pictures"):
        encode_here(tokenizer_file, tmp_path, tmp_path / "out", "--unlabelled")
    Image.new("RGB", (16, 16)).save(tmp_path / "4.png")  # repaired: it is tried again
    assert "unreadable pictures: none" in encode_here(tokenizer_file, tmp_path, tmp_path / "out", "--unlabelled")
    assert data.open_codes(tmp_path / "out").labels.tolist() == [0] * 6
