import io
import multiprocessing
import os
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from golden_files import load
from PIL import Image, PngImagePlugin

import data
from runtime import UserError


def save(path, colour=(200, 30, 60), size=(20, 20), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def folder_of(tmp_path, good, bad=()):
    """One class of grey pictures: number i has level i; those in `bad` hold no picture."""
    for i in range(good + len(bad)):
        path = save(tmp_path / "class" / f"{i:04}.png", (i, i, i))
        if i in bad:
            path.write_bytes(b"")
    return tmp_path


class Spy(torch.utils.data.Dataset):
    """A data set whose pictures say which entry was asked for."""

    shape = (1, 1)

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, entry):
        epoch, index = entry
        return torch.tensor([epoch, index, 0], dtype=torch.uint8).view(3, 1, 1), index


def entries_in(batches):
    """The (epoch, index) of every sample, in order."""
    return [tuple(image.flatten()[:2].tolist()) for images, *_ in batches for image in images]


# ----------------------------------------------------------------------------------------------------------------------
# Pixels


def test_golden_resize_and_centre_crop(tmp_path):
    golden = load("preprocess")
    for i in range(6):
        picture = Image.fromarray(golden[f"input_{i}"].numpy())
        ours = torch.from_numpy(np.array(data.resize_and_crop(picture, 64)))
        assert torch.equal(ours, golden[f"center_crop_64_{i}"]), i
        (tmp_path / "class").mkdir(exist_ok=True)
        picture.save(tmp_path / "class" / f"{i}.png")
    dataset = data.open_pictures(tmp_path, 64, train=False)
    for i in range(6):
        image, label = dataset[3, i]
        assert torch.equal(image.movedim(0, -1), golden[f"center_crop_64_{i}"])
        assert image.is_contiguous() and label == 0


@pytest.mark.parametrize("extra, offset", [(1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (7, 4)])
def test_the_centre_is_rounded_to_even(extra, offset):
    places = np.arange(16 + extra, dtype=np.uint8)
    for axis in (0, 1):
        levels = np.broadcast_to(np.expand_dims(places, 1 - axis), (16, 16 + extra)[:: 1 if axis else -1])
        picture = Image.fromarray(np.ascontiguousarray(np.repeat(levels[..., None], 3, 2)))
        assert data.resize_and_crop(picture, 16).getpixel((0, 0)) == (offset,) * 3


def test_training_crops_reach_every_offset_and_belong_to_seed_epoch_and_index(tmp_path):
    columns = np.arange(18, dtype=np.uint8)
    picture = np.broadcast_to(columns[None, :, None], (16, 18, 3))  # each pixel's value is its column
    (tmp_path / "class").mkdir()
    for i in range(2):
        Image.fromarray(np.ascontiguousarray(picture)).save(tmp_path / "class" / f"{i}.png")

    def offsets(seed, index):
        dataset = data.open_pictures(tmp_path, 16, train=True, seed=seed)
        return [dataset[epoch, index][0][0, 0, 0].item() for epoch in range(40)]

    assert set(offsets(0, 0)) == {0, 1, 2}
    assert offsets(0, 0) == offsets(0, 0)
    assert offsets(0, 0) != offsets(1, 0) and offsets(0, 0) != offsets(0, 1)
    image = data.open_pictures(tmp_path, 16, train=True)[0, 0][0]
    assert (image[:, :, 1:] - image[:, :, :-1] == 1).all()  # cropped, neither scaled nor flipped


def test_levels():
    levels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert torch.allclose(data.to_float(levels), torch.tensor([-1.0, -0.6, 1.0]), atol=1e-7)
    floats = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])  # 0 is level 127.5, 0.999 is 254.87
    assert data.to_uint8(floats).tolist() == [0, 0, 127, 254, 255, 255]
    assert data.to_uint8(floats, rounding=True).tolist() == [0, 0, 128, 255, 255, 255]
    # 128.99, which arithmetic in bfloat16 would make 129.
    assert data.to_uint8(torch.tensor([0.01171875], dtype=torch.bfloat16)).tolist() == [128]


def test_picture_grid():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 4, 6)
    sheet = np.array(data.to_picture(data.tile(images, columns=2)))
    assert sheet.shape == (3 * 4 + 2 * 2, 2 * 6 + 2, 3)
    assert (sheet[:4, :6] == 0).all() and (sheet[:4, 8:] == 1).all() and (sheet[12:, :6] == 4).all()
    assert (sheet[4:6] == 230).all() and (sheet[12:, 8:] == 230).all()


def test_tiles_of_clips_are_those_of_their_frames():
    clips = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 7, 4, 6), np.uint8))
    sheet = data.tile(clips, columns=2)
    assert sheet.shape == (3, 7, 3 * 4 + 2 * 2, 2 * 6 + 2) and sheet.dtype == torch.uint8
    for number in range(7):
        frame = np.asarray(data.to_picture(data.tile(clips[:, :, number], columns=2)))
        np.testing.assert_array_equal(sheet[:, number].movedim(0, -1), frame)


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def test_classes_names_and_labels(tmp_path):
    for name in ["b/z.JPEG", "b/deep/er/a.png", "a10/x.bmp", "a9/y.webp", "B/q.Tiff"]:
        save(tmp_path / name)
    for name in ["b/notes.txt", "b/.hidden.png", "b/.cache/p.png", ".git/p.png", "loose.png"]:
        save(tmp_path / name, format="PNG")
    dataset = data.open_pictures(tmp_path, 16, train=False)
    assert dataset.classes == ["B", "a10", "a9", "b"]
    names = [dataset.name(i) for i in range(len(dataset))]
    assert names == ["B/q.Tiff", "a10/x.bmp", "a9/y.webp", "b/deep/er/a.png", "b/z.JPEG"]
    assert list(dataset.labels) == [0, 1, 2, 3, 3] and dataset[0, 4][1] == 3

    everything = data.open_pictures(tmp_path, 16, train=False, labelled=False)
    assert everything.classes == ["all"] and list(everything.labels) == [0] * 6
    assert "loose.png" in [everything.name(i) for i in range(6)]


def test_class_folders_where_there_are_such(tmp_path):
    """A set of class folders stays what it was, in its own order; any other is one class."""

    def names(**options):
        dataset = data.open_pictures(tmp_path, 16, train=True, **options)
        return dataset.classes, list(dataset.labels), [dataset.name(i) for i in range(len(dataset))]

    for name in ["a/z.png", "a/b/c.png", "a-b/x.png"]:  # as paths, a-b comes before a
        save(tmp_path / name)
    by_class = names(), data.identity(data.open_pictures(tmp_path, 16, train=True))
    assert by_class[0] == (["a", "a-b"], [0, 0, 1], ["a/b/c.png", "a/z.png", "a-b/x.png"])
    either = data.open_pictures(tmp_path, 16, train=True, labelled=None)
    assert (names(labelled=None), data.identity(either)) == by_class
    (tmp_path / "empty").mkdir()
    assert names(labelled=None) == (["all"], [0] * 3, ["a-b/x.png", "a/b/c.png", "a/z.png"]) == names(labelled=False)
    (tmp_path / "empty").rmdir()
    save(tmp_path / "loose.png")
    assert names(labelled=None) == by_class[0]  # as without: beside class folders it has never counted
    for folder in ("a", "a-b"):
        shutil.rmtree(tmp_path / folder)
    assert names(labelled=None) == (["all"], [0], ["loose.png"])


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    def complaint(path, **options):
        with pytest.raises(UserError) as error:
            data.open_pictures(path, 16, train=True, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "there is no picture folder" in complaint(tmp_path / "none")
    assert "there is no picture folder" in complaint(save(tmp_path / "files" / "one.png"))
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in complaint(tmp_path / "empty")
    assert "holds no pictures" in complaint(tmp_path / "empty", labelled=False)
    assert "holds no pictures" in complaint(tmp_path / "empty", labelled=None)
    assert "no class folders, its 1 pictures lie directly in it" in complaint(tmp_path / "files")
    save(tmp_path / "half" / "full" / "p.png")
    (tmp_path / "half" / "hollow").mkdir()
    assert "hollow holds no pictures" in complaint(tmp_path / "half")
    for i in range(3):
        (save(tmp_path / "dead" / "class" / f"{i}.png")).write_bytes(b"no picture")
    assert "not one of the first 3 pictures" in complaint(tmp_path / "dead")
    for size, seed in ((0, 0), (16, -1)):
        with pytest.raises(AssertionError):
            data.open_pictures(tmp_path / "half", size, train=True, seed=seed)


def test_each_folder_is_listed_once_whatever_links_lead_to_it(tmp_path):
    for name in ["d/a/0.png", "d/b/0.png", "d/b/.hidden/0.png", "else/1.png", "else/deep/2.png"]:
        save(tmp_path / name)
    for link, target in [
        ("a/loop", "."),
        ("a/up", ".."),
        ("a/b", "../b"),  # listed as b
        ("a/out", "../../else"),
        ("b/out", "../../else"),  # listed as a's
        ("b/shown", ".hidden"),
        ("c", "../else/deep"),  # a class: before the links inside the others
    ]:
        (tmp_path / "d" / link).symlink_to(target)
    dataset = data.open_pictures(tmp_path / "d", 16, train=False)
    names = ["a/0.png", "a/out/1.png", "b/0.png", "b/shown/0.png", "c/2.png"]
    assert [dataset.name(i) for i in range(len(dataset))] == names and list(dataset.labels) == [0, 0, 1, 1, 2]
    assert len(data.open_pictures(tmp_path / "d", 16, train=False, labelled=False)) == 5
    (tmp_path / "d" / "z").symlink_to("a")
    with pytest.raises(UserError, match="z holds no pictures.*linked to twice counts once"):
        data.open_pictures(tmp_path / "d", 16, train=False)


def test_identity_is_of_what_a_folder_holds_not_of_where_it_lies(tmp_path, monkeypatch):
    def of(source):
        return data.identity(data.open_pictures(source, 16, train=False))

    save(tmp_path / "d" / "a" / "0.png")
    save(tmp_path / "d" / "b" / "1.png")
    (tmp_path / "link").symlink_to("d")
    monkeypatch.chdir(tmp_path)
    same = {of(tmp_path / "d"), of("d/"), of("./d"), of("link")}
    assert len(same) == 1
    os.rename(tmp_path / "d" / "b", tmp_path / "d" / "c")
    same.add(of("d"))
    os.rename(tmp_path / "d" / "a" / "0.png", tmp_path / "d" / "c" / "0.png")
    save(tmp_path / "d" / "a" / "1.png")
    same.add(of("d"))
    glyphs = {of("glyphs:9:AB"), of("glyphs:8:AB"), of("glyphs:9:AC"), of("glyphs:9:BA")}
    assert len(same | glyphs) == 7 and of("glyphs:9:AB") in glyphs


# ----------------------------------------------------------------------------------------------------------------------
# Odd and unreadable pictures


def test_only_plain_files_of_the_named_formats_are_opened(tmp_path):
    def reason(path):
        with pytest.raises((ValueError, OSError)) as error:
            data.load_rgb(path)
        return str(error.value)

    path = tmp_path / "x.png"
    for foreign in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 30\n%%EndComments\n", b"", b"text"):
        path.write_bytes(foreign)
        assert "not a picture that Pillow reads as AVIF, BMP, GIF, JPEG, JPEG2000, PNG, PPM, TIFF, WEBP" in reason(path)
    Image.new("RGB", (20, 20)).save(path, format="ICO")
    assert "not a picture" in reason(path)
    path.unlink()
    os.mkfifo(path)  # opening it would wait for a writer
    assert "no plain file" in reason(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "no plain file" in reason(path)
    path.unlink()
    path.mkdir()
    assert "directory" in reason(path)
    save(tmp_path / "y.png", pnginfo=text_of(3_000_000))
    assert data.load_rgb(tmp_path / "y.png").getpixel((0, 0)) == (200, 30, 60)


def text_of(length):
    info = PngImagePlugin.PngInfo()
    info.add_text("history", "x" * length, zip=True)
    return info


@pytest.mark.parametrize("kind", ["float32", "int32", "uint32", "int16"])
def test_grey_whose_range_is_not_known_is_refused(tmp_path, kind):
    Image.fromarray(np.full((20, 20), 200, np.float32 if kind == "float32" else np.int32)).save(tmp_path / "x.tif")
    tags = {"uint32": (32, 1), "int16": (16, 2)}
    if kind in tags:  # Pillow does not write these
        bits, form = tags[kind]
        write_tiff(tmp_path / "x.tif", np.full((20, 20), 200, kind).tobytes(), bits, {339: form})
    with pytest.raises(ValueError, match="grey levels are floats"):
        data.load_rgb(tmp_path / "x.tif")


def test_grey_tiffs_are_read_as_what_they_show(tmp_path):
    white_is_zero = np.full((20, 20), 65535 - 100 * 257, np.uint16).tobytes()
    twelve_bits = bytes([0x64, 0x06, 0x46]) * 200  # twice 0x646, 1606 of 4095
    for content, bits, tags in [(white_is_zero, 16, {262: 0}), (twelve_bits, 12, {})]:
        write_tiff(tmp_path / "x.tif", content, bits, tags)
        assert data.load_rgb(tmp_path / "x.tif").getcolors() == [(400, (100, 100, 100))]


def write_tiff(path, pixels, bits, tags):
    """A grey TIFF, 20x20, uncompressed."""
    tags = {256: 20, 257: 20, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 20, 279: len(pixels)} | tags
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    header = struct.pack("<2sHI", b"II", 42, 8 + len(pixels))
    path.write_bytes(header + pixels + struct.pack("<H", len(tags)) + entries + bytes(4))


def test_the_reason_is_said_of_a_folder_of_which_nothing_can_be_read(tmp_path):
    Image.new("1", (14_000, 14_000)).save(save(tmp_path / "a" / "x.png"))
    with pytest.raises(UserError, match="a/x.png: Image size .196000000 pixels. exceeds limit"):
        data.open_pictures(tmp_path, 16, train=True)


def test_odd_pictures_are_read_as_what_they_show(tmp_path, recwarn):
    def level(picture, size=8, **options):
        """What a one-coloured picture comes out as."""
        file = tmp_path / "class" / "p"
        file.parent.mkdir(exist_ok=True)
        if isinstance(picture, bytes):
            file.write_bytes(picture)
        else:
            picture.save(file, **options)
        image = data.resize_and_crop(data.load_rgb(file), size)
        assert image.mode == "RGB" and image.size == (size, size)
        colours = image.getcolors(size * size)
        assert len(colours) == 1, colours
        return colours[0][1]

    cmyk = level(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), format="JPEG")
    assert np.abs(np.subtract(cmyk, (255, 0, 0))).max() <= 3
    assert level(Image.new("L", (20, 20), 77), format="PNG") == (77, 77, 77)
    assert level(Image.new("1", (20, 20), 1), format="PNG") == (255, 255, 255)
    assert level(Image.new("RGBA", (20, 20), (9, 8, 7, 0)), format="PNG") == (9, 8, 7)
    palette = Image.new("P", (20, 20), 3)
    palette.putpalette([0] * 9 + [10, 20, 30] + [255] * 756)
    assert level(palette, format="PNG", transparency=bytes(range(256))) == (10, 20, 30)
    assert level(palette, format="GIF") == (10, 20, 30)
    grey16 = Image.fromarray(np.full((20, 20), 100 * 257, np.uint16))  # 16 bits: level 100 is 100 * 257
    assert level(grey16, format="PNG") == (100, 100, 100)
    assert level(grey16, format="TIFF") == (100, 100, 100)
    big_endian = b"P5 4 4 65535\n" + (100 * 257).to_bytes(2, "big") * 16
    assert level(big_endian) == (100, 100, 100)
    assert level(Image.new("RGB", (1, 1), (1, 2, 3)), format="PNG") == (1, 2, 3)
    assert level(Image.new("RGB", (20_000, 10), (1, 2, 3)), format="PNG") == (1, 2, 3)
    for shape in ((20_000, 1), (1, 20_000)):
        with pytest.raises(ValueError, match="enlarged to size it would have 1311 million pixels"):
            level(Image.new("RGB", shape), size=256, format="PNG")
    assert level(Image.new("RGB", (20, 20), (0, 0, 0)), format="JPEG", exif=b"Exif\0\0II*\0\xff\xff") == (0, 0, 0)
    assert [str(warning.message) for warning in recwarn] == []


def test_orientation_in_exif_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    path = save(tmp_path / "turned.jpg", size=(40, 20), exif=exif)
    assert data.load_rgb(path).size == (40, 20)


def unreadable_kinds():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    jpeg = io.BytesIO()
    noise.save(jpeg, "JPEG")

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    return {
        "truncated": jpeg.getvalue()[: len(jpeg.getvalue()) // 2],
        "empty": b"",
        "text": b"this is no picture\n" * 10,
        "bomb": bomb,
    }


@pytest.mark.parametrize("kind", unreadable_kinds())
def test_the_next_readable_picture_takes_an_unreadable_ones_place(tmp_path, kind, recwarn):
    for i in range(5):
        save(tmp_path / f"{i}" / "p.png", (i, i, i))
    for i in (1, 2, 4):
        (tmp_path / f"{i}" / "p.png").write_bytes(unreadable_kinds()[kind])
    dataset = data.open_pictures(tmp_path, 16, train=True)
    for index, place in enumerate([0, 3, 3, 3, 0]):
        batch = data.read_batch(dataset, [(7, index)], tries=5)
        assert (batch.images == place).all() and batch.labels == [place] and batch.indices == [index]
        assert list(batch.unreadable) == ([] if place == index else [index])
        assert all(reason and "\n" not in reason for reason in batch.unreadable.values())
    assert [str(warning.message) for warning in recwarn] == []


class Gone(Spy):
    """A data set whose disk is no longer there."""

    source = "there"

    def __getitem__(self, entry):
        raise FileNotFoundError(2, "No such file or directory")


@pytest.mark.parametrize("workers", [0, 1])
def test_training_ends_in_one_line_where_no_picture_can_be_read_any_more(workers):
    with pytest.raises(UserError, match="^too many pictures in there cannot be read: No such file or directory$"):
        next(data.training_batches(Gone(9), 0, 4, 2, 0, 1, 0, 1, workers))


def test_pictures_as_they_are(tmp_path):
    save(tmp_path / "a.png", (1, 2, 3), size=(7, 5))
    dataset = data.PictureFolder(tmp_path, size=None, labelled=False)
    assert dataset.shape is None and torch.equal(dataset[0, 0][0][:, 4, 6], torch.tensor([1, 2, 3], dtype=torch.uint8))
    (batch,) = data.evaluation_batches(dataset, 2)
    assert batch.images.shape == (1, 3, 5, 7) and batch.images.is_contiguous()


def test_more_than_one_percent_unreadable_stops(tmp_path, capsys):
    bad = data.BadPictures(data.open_pictures(folder_of(tmp_path, 198, bad=(7, 150)), 16, train=True))
    assert bad.report([]) == "unreadable pictures: none"
    bad.add({7: "cut short"})
    bad.add({7: "cut short", 150: "empty"})  # 7 again, in another epoch
    assert capsys.readouterr().err.splitlines() == [
        "warning: unreadable picture skipped: class/0007.png (cut short)",
        "warning: unreadable picture skipped: class/0150.png (empty)",
    ]
    bad.check(2)
    bad.check(bad.count, epochs=2)
    examples = "class/0007.png (cut short), class/0150.png (empty)"
    with pytest.raises(UserError, match=f"more than 1% of the 200 pictures .*{re.escape(examples)}"):
        bad.check(bad.count)  # three in one epoch
    with pytest.raises(UserError):
        data.BadPictures(bad.dataset).check(5, epochs=2)
    assert bad.report([bad.seen]) == f"unreadable pictures: 2 ({examples})"


# ----------------------------------------------------------------------------------------------------------------------
# Order and batches


def test_every_epoch_is_a_permutation_of_its_own():
    order = data.SampleOrder(13, seed=5)
    entries = order.at(0, 13 * 4)
    epochs = [entries[13 * i : 13 * i + 13] for i in range(4)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        assert sorted(i for _, i in epoch) == list(range(13))
    assert len({tuple(i for _, i in epoch) for epoch in epochs}) == 4
    assert entries[:13] != data.SampleOrder(13, seed=6).at(0, 13)


def test_the_order_from_any_sample_is_the_rest_of_the_whole():
    whole = data.SampleOrder(13, seed=5).at(0, 100)
    for first in range(0, 60, 7):
        order = data.SampleOrder(13, seed=5)
        assert order.at(first, 5) + order.at(first + 5, 30) == whole[first : first + 35]


def spy_steps(rank=0, world=1, micro_batch=3, first=0, total=9):
    steps = data.training_batches(Spy(20), 1, 12, micro_batch, rank, world, first, total)
    return [entries_in(micro_batches) for micro_batches in steps]


def test_training_goes_on_where_it_stopped():
    whole = spy_steps()
    assert len(whole) == 9 and [entry for step in whole for entry in step] == data.SampleOrder(20, 1).at(0, 9 * 12)
    for first in (1, 4, 8):
        assert spy_steps(first=first) == whole[first:]


def test_ranks_share_a_global_batch_by_micro_batches():
    whole = spy_steps()
    for world in (2, 4):
        shares = [spy_steps(rank, world) for rank in range(world)]
        assert [[entry for part in parts for entry in part] for parts in zip(*shares)] == whole
    micro_batches = next(data.training_batches(Spy(20), 1, 12, 3, 1, 2, 0, 1))
    assert [len(images) for images, *_ in micro_batches] == [3, 3]
    with pytest.raises(UserError, match="--global-batch"):
        data.training_batches(Spy(20), 1, 12, 5, 0, 1, 0, 1)


def test_batches_do_not_depend_on_workers_nor_move_the_global_generator(tmp_path):
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (16, 40, 3), dtype=np.uint8)
        path = save(tmp_path / f"class{i % 3}" / f"{i}.png")
        Image.fromarray(noise).save(path)
    path.write_bytes(b"")
    dataset = data.open_pictures(tmp_path, 16, train=True)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    alone, helped = (
        [batch for step in data.training_batches(dataset, 0, 8, 4, 0, 1, 1, 5, workers) for batch in step]
        for workers in (0, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert len(alone) == len(helped) == 8
    for ours, other in zip(alone, helped):
        assert ours.images.dtype == torch.uint8 and ours.images.shape == (4, 3, 16, 16)
        assert ours.labels.dtype == torch.int64 and ours.unreadable == other.unreadable
        assert torch.equal(ours.images, other.images) and torch.equal(ours.labels, other.labels)
    assert {dataset.name(index) for batch in alone for index in batch.unreadable} == {"class2/11.png"}


def _no_shared_memory():
    """As where /dev/shm is full: whoever wants to send a tensor cannot."""

    def full(*_):
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")

    multiprocessing.reduction.ForkingPickler.register(torch.Tensor, full)


def _read_without_shared_memory(queue):
    _no_shared_memory()
    batches = data.evaluation_batches(data.open_pictures("glyphs:9", 16, train=True), 4, workers=2)
    queue.put([indices.tolist() for _, _, indices, _ in batches])


def _send_what_cannot_be_sent(queue):
    _no_shared_memory()
    data.read_batch = lambda *_, **__: (torch.zeros(3), {})
    batches = data._loader(Spy(9), [[(0, 1)], [(0, 2)]], 0, 1)
    try:
        next(batches)
    except RuntimeError as error:
        queue.put(str(error))


@pytest.mark.parametrize(
    "work, result",
    [
        (_read_without_shared_memory, "[[0, 1, 2, 3], [4, 5, 6, 7], [8]]"),
        (_send_what_cannot_be_sent, "DataLoader worker"),
    ],
)
def test_loaders_need_no_shared_memory_and_end_where_they_cannot_send(work, result):
    queue = multiprocessing.get_context("fork").SimpleQueue()
    child = multiprocessing.get_context("fork").Process(target=work, args=(queue,))
    child.start()
    child.join(60)
    hanging = child.is_alive()
    child.kill()
    assert not hanging and str(queue.get()).startswith(result)


@pytest.mark.parametrize("world, workers", [(1, 0), (2, 0), (3, 0), (2, 2)])
def test_evaluation_takes_every_readable_picture_once(tmp_path, world, workers):
    dataset = data.open_pictures(folder_of(tmp_path, 11, bad=(0, 1, 8)), 16, train=False)
    seen, unreadable = [], []
    for rank in range(world):
        for images, labels, indices, bad in data.evaluation_batches(dataset, 2, rank, world, workers):
            assert len(images) == len(labels) == len(indices) <= 2 and images.shape[1:] == (3, 16, 16)
            assert images[:, 0, 0, 0].tolist() == indices.tolist() and labels.dtype == torch.int64
            seen += indices.tolist()
            unreadable += bad
    assert sorted(seen) == [2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13] and sorted(unreadable) == [0, 1, 8]


def test_evaluation_of_some_pictures_with_several_crops():
    batches = list(data.evaluation_batches(Spy(20), 2, indices=[3, 5, 9], crops=2))
    assert [entries_in([batch]) for batch in batches] == [[(0, 3), (1, 3), (0, 5), (1, 5)], [(0, 9), (1, 9)]]
