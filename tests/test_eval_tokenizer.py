import json
import math
import os
import sys
import urllib.request
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from golden_files import fill, load
from pages import read_page
from PIL import Image
from scripts import fails_with_one_line, on_two_ranks, run

import data
import eval_tokenizer
import fid
from inception import INCEPTION_FILE, InceptionV3
from losses import LPIPS
from runtime import Runtime, UserError
from tokenizer import Tokenizer, TokenizerConfig

CONFIG = TokenizerConfig(32, (1, 2), 1, bits=10)
STATISTICS = "scaling_layer.shift", "scaling_layer.scale"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Six 40x32 pictures of unequal noise, a tokenizer with an average that differs, the metrics' weights."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(6):
        noise = rng.normal(128, 12 * number, (32, 40, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noise).save(pictures / f"{number}.png")
    raw, average = fill(Tokenizer(CONFIG)), fill(Tokenizer(CONFIG), "average.")
    state = {"kind": "tokenizer", "config": vars(CONFIG), "tokenizer": raw.state_dict()}
    torch.save(state | {"tokenizer_ema": average.state_dict()}, folder / "tokenizer.pt")
    inception = fill(InceptionV3())
    inception.load_state_dict(inception.state_dict() | load("inception_bn"))
    torch.save(inception.state_dict(), folder / "inception.pth")
    lpips = {network: fill(LPIPS(network), f"{network}.", keep=STATISTICS) for network in ("vgg", "alex")}
    for network, module in lpips.items():
        torch.save(module.state_dict(), folder / f"{network}.pt")
    return SimpleNamespace(folder=folder, raw=raw.eval(), average=average.eval(), inception=inception, lpips=lpips)


@pytest.fixture(autouse=True)
def one_thread():
    """As in the scripts' processes: with more, some convolutions add in another order, and a code may tip over."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def named(files):
    return ["--tokenizer", files.folder / "tokenizer.pt", "--data", files.folder / "pictures"]


@pytest.fixture
def evaluate(files, tmp_path, monkeypatch):
    """Run the script in this process, offline, on the six pictures at size 32; returns what it wrote."""

    def offline(*_, **__):
        raise OSError("no network")

    def call(*flags):
        arguments = [*named(files), "--size", 32, "--workers", 0]
        arguments += ["--batch", 3, "--out", tmp_path / "out", *flags]
        monkeypatch.setattr(sys, "argv", ["eval_tokenizer.py", *map(str, arguments)])
        eval_tokenizer.main()
        return json.loads((tmp_path / "out" / "metrics.json").read_text())

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    return call


def centre_crops(files):
    """(6, 3, 32, 32) uint8: the pictures are 40x32, so only the crop is left to do."""
    paths = sorted((files.folder / "pictures").iterdir())
    crops = [np.asarray(Image.open(path))[:, 4:36] for path in paths]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def rebuilt(tokenizer, images):
    """Float, clamped reconstructions and the indices. By threes, as the script is told below: in batches of other sizes
    the last bit may differ, and with it the level that a value is truncated to."""
    parts = [tokenizer(batch / 127.5 - 1)[:2] for batch in images.split(3)]
    return torch.cat([y for y, _ in parts]).clamp(-1, 1), torch.cat([indices for _, indices in parts])


def errors(images, y_uint8):
    """Mean squared error of each picture on [0, 1]."""
    return ((images.double() - y_uint8.double()) / 255).square().mean((1, 2, 3)).numpy()


def test_published_psnr_golden(monkeypatch):
    golden = load("metrics")
    monkeypatch.setattr(eval_tokenizer, "PUBLISHED_BATCH", 6)
    ours = eval_tokenizer.published_psnr(golden["psnr_per_image"])
    assert ours.tolist() == pytest.approx([golden["psnr_whole_batch"].item()], abs=2e-6)


def test_published_originals():
    """Grey levels 1 to 95 come out one lower; rounded, none."""
    levels = torch.arange(256, dtype=torch.uint8)
    lowered = levels.int() - eval_tokenizer.published_original(levels).int()
    assert lowered.tolist() == [0] + [1] * 95 + [0] * 160
    assert torch.equal(eval_tokenizer.published_original(levels, rounding=True), levels)


def test_published_psnr_is_of_fours():
    psnr = torch.tensor([10.0, 20, 30, 40, 50, 60], dtype=torch.float64)
    expected = [-10 * math.log10((0.1 + 0.01 + 0.001 + 0.0001) / 4), -10 * math.log10((1e-5 + 1e-6) / 2)]
    assert eval_tokenizer.published_psnr(psnr).tolist() == pytest.approx(expected, rel=1e-12)
    assert eval_tokenizer.published_psnr(torch.tensor([math.inf] * 4)).tolist() == [math.inf]


def test_infinite_values_are_counted_not_averaged():
    assert eval_tokenizer.finite_mean(torch.tensor([1.0, 3.0]), "two") == (2, "dB, mean over two")
    for values, mean, infinite in ([1.0, math.inf, 3.0], 2, 1), ([math.inf] * 2, math.inf, 2):
        found, note = eval_tokenizer.finite_mean(torch.tensor(values), "all")
        assert found == mean and f"; {infinite} are infinite" in note


def test_every_number_on_two_processes(files, tmp_path):
    flags = ["--size", 32, "--batch", 3, "--workers", 0, "--inception", files.folder / "inception.pth"]
    flags += ["--lpips-vgg", files.folder / "vgg.pt", "--lpips-alex", files.folder / "alex.pt", "--out", tmp_path]
    words = run("eval_tokenizer.py", *named(files), *flags, processes=2).stdout
    found = json.loads((tmp_path / "metrics.json").read_text())

    images = centre_crops(files)
    y, indices = rebuilt(files.average, images)
    y_uint8 = (255 * (y + 1) / 2).to(torch.uint8)  # truncated
    error = errors(images, y_uint8)
    lower = images - ((images >= 1) & (images <= 95)).byte()  # the originals of the published numbers
    published = errors(lower, y_uint8)
    fours = [-10 * math.log10(published[:4].mean()), -10 * math.log10(published[4:].mean())]
    assert found["PSNR"] == pytest.approx((-10 * np.log10(error)).mean(), rel=1e-6)
    assert found["PSNR published"] == pytest.approx(np.mean(fours), rel=1e-6)
    assert found["SSIM"] == pytest.approx(fid.ssim(images, y_uint8).mean().item(), rel=1e-6)
    assert found["SSIM published"] == pytest.approx(fid.ssim(lower, y_uint8).mean().item(), rel=1e-6)
    assert abs(found["SSIM published"] - found["SSIM"]) > 1e-6
    x = images / 127.5 - 1
    for name, network in (("LPIPS VGG", "vgg"), ("LPIPS AlexNet", "alex")):
        assert found[name] == pytest.approx(files.lpips[network](x, y).mean().item(), rel=1e-5)
    features = [files.inception((z + 1) / 2, "half-pixel")[0].double() for z in (x, y)]
    moments = [part for points in features for part in (points.mean(0), torch.cov(points.T))]
    assert found["rFID"] == pytest.approx(fid.frechet_distance(*moments), rel=1e-5)
    used = len(indices.unique())
    assert 1 < used < 2**10 and found["codebook use"] == used / 2**10
    assert found["bits per pixel"] == 10 / 4
    assert found["pictures"] == 6

    for text in ("truncated", "half-pixel", "NOT the published file", "cpu x 2", f"{used} of 1024 codes", "biased"):
        assert text in words
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "reconstructions.png"))).permute(2, 0, 1)
    # The main process's first batch of three: originals above, reconstructions below, two pixels between.
    assert torch.equal(sheet[:, :32, 34:66], images[1])
    assert torch.equal(sheet[:, 34:, 34:66], y_uint8[1])


def test_without_networks_the_rest_is_measured(evaluate, files, tmp_path, capsys):
    found = evaluate()
    error = errors(centre_crops(files), (255 * (rebuilt(files.average, centre_crops(files))[0] + 1) / 2).byte())
    assert found["PSNR"] == pytest.approx((-10 * np.log10(error)).mean(), rel=1e-6)
    printed = capsys.readouterr().out
    for name, file in [
        ("rFID", INCEPTION_FILE),
        ("LPIPS VGG", "vgg16-397923af.pth"),
        ("LPIPS AlexNet", "alexnet-owt-7be5be79.pth"),
    ]:
        assert found[name].startswith("not computed (could not download") and file in found[name]
        assert f"{name:<15} not computed" in printed


def _load_on_rank_zero(path):
    if dist.get_rank():
        raise UserError("cut short")


def _lacking(rank):
    rt = Runtime(torch.device("cpu"), rank, 2, dist.group.WORLD)
    assert eval_tokenizer.if_there(rt, _load_on_rank_zero, None) == (None, "not computed (cut short)")


def test_what_one_rank_lacks_no_rank_computes(tmp_path):
    on_two_ranks(_lacking, tmp_path)


def test_raw_and_rounding(evaluate, files):
    images = centre_crops(files)
    levels = 255 * (rebuilt(files.raw, images)[0] + 1) / 2
    for flags, y_uint8 in ([], levels.byte()), (["--rounding"], levels.round().byte()):
        error = errors(images, y_uint8)
        assert evaluate("--raw", *flags)["PSNR"] == pytest.approx((-10 * np.log10(error)).mean(), rel=1e-6)


def test_pictures_given_back_exactly(files):
    class Copy(torch.nn.Module):
        config, factor = CONFIG, 2

        def forward(self, images):
            return images, torch.zeros(len(images), 16, 16, dtype=torch.int64), {}

    args = SimpleNamespace(batch=4, workers=0, precision="fp32", rounding=True)
    rt = eval_tokenizer.runtime.Runtime(torch.device("cpu"))
    pictures = data.open_pictures(files.folder / "pictures", 32, train=False, labelled=False)
    numbers, notes, _ = eval_tokenizer.measure(rt, args, Copy(), pictures, None, {})
    assert numbers["PSNR"] == numbers["PSNR published"] == math.inf
    assert "6 are infinite" in notes["PSNR"] and "2 are infinite" in notes["PSNR published"]
    assert numbers["codebook use"] == 1 / 2**10


@torch.no_grad()
@pytest.mark.parametrize("sides", [(8, 16), (9, 7), (1, 9), (3, 13), (31, 16)])
def test_pictures_of_any_size_are_padded_and_cut(sides):
    """The halves that the padding is made of, by hand."""
    tokenizer, (height, width) = fill(Tokenizer(TokenizerConfig(32, (1, 1, 1, 1), 1, bits=10))).eval(), sides
    x = torch.rand(2, 3, height, width) * 2 - 1
    padded_height, padded_width = math.ceil(height / 8) * 8, math.ceil(width / 8) * 8
    top, left = (padded_height - height) // 2, (padded_width - width) // 2
    padded = torch.zeros(2, 3, padded_height, padded_width)
    padded[:, :, top : top + height, left : left + width] = x
    truth, codes, _ = tokenizer(padded)
    y, indices = eval_tokenizer.rebuild(tokenizer, x)
    assert torch.equal(y, truth[:, :, top : top + height, left : left + width]) and torch.equal(indices, codes)
    assert y.shape == x.shape


def odd_pictures(folder):
    """Pictures of five sizes and three modes; their names, in order. One has a name that is not UTF-8."""
    rng = np.random.default_rng(1)
    shapes = {"a.png": (33, 40, 3), "a.webp": (40, 31, 4), "b/a.png": (32, 31)}
    shapes |= {os.fsdecode(b"caf\xe9.bmp"): (64, 32, 3), "z.png": (32, 35, 3)}
    for name, shape in shapes.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(rng.normal(128, 40, shape).clip(0, 255).astype(np.uint8))
        picture.save(folder / name, lossless=True)
    return sorted(shapes)


@torch.no_grad()
def test_original_size_on_two_processes(files, tmp_path):
    names = odd_pictures(tmp_path / "pictures")
    flags = ["--tokenizer", files.folder / "tokenizer.pt", "--data", tmp_path / "pictures", "--size", "original"]
    flags += ["--batch", 5, "--workers", 0, "--inception", files.folder / "inception.pth"]
    flags += ["--lpips-vgg", files.folder / "vgg.pt", "--lpips-alex", files.folder / "alex.pt"]
    flags += ["--save-pictures", tmp_path / "saved", "--out", tmp_path / "out", "--html"]
    words = run("eval_tokenizer.py", *flags, processes=2).stdout
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())

    pngs = {name: name.rsplit(".", 1)[0] + ".png" for name in names} | {n: f"{n}.png" for n in ("a.png", "a.webp")}
    columns, features, tokens, pixels = [], ([], []), 0, 0
    for name in names:
        image = torch.from_numpy(np.array(Image.open(tmp_path / "pictures" / name).convert("RGB"))).permute(2, 0, 1)
        x = image[None] / 127.5 - 1
        y, indices = eval_tokenizer.rebuild(files.average, x)
        y = y.clamp(-1, 1)
        y_uint8 = (255 * (y + 1) / 2).to(torch.uint8)
        saved = np.asarray(Image.open(tmp_path / "saved" / pngs[name]))
        assert np.array_equal(saved, y_uint8[0].permute(1, 2, 0)), name
        lower = image - ((image >= 1) & (image <= 95)).byte()
        columns.append([-10 * math.log10(errors(of[None], y_uint8)[0]) for of in (image, lower)])
        columns[-1] += [fid.ssim(of[None], y_uint8).item() for of in (image, lower)]
        columns[-1] += [files.lpips[network](x, y).item() for network in ("vgg", "alex")]
        for points, z in zip(features, (x, y)):
            points.append(files.inception((z + 1) / 2, "half-pixel")[0].double())
        tokens, pixels = tokens + indices.numel(), pixels + image[0].numel()
    saved = {str(path.relative_to(tmp_path / "saved")) for path in (tmp_path / "saved").rglob("*.*")}
    assert saved == set(pngs.values())
    entries, texts, _ = read_page(tmp_path / "out" / "reconstructions.html")
    for name, (caption, (original, y_uint8)), column in zip(names, entries, columns, strict=True):
        shown = name.encode("utf-8", "backslashreplace").decode()
        assert caption == f"{shown}: {column[0]:.2f} dB" and "5 of 5" in texts
        assert np.array_equal(original, Image.open(tmp_path / "pictures" / name).convert("RGB"))
        assert np.array_equal(y_uint8, Image.open(tmp_path / "saved" / pngs[name]))
    kinds = ["PSNR", "PSNR published", "SSIM", "SSIM published", "LPIPS VGG", "LPIPS AlexNet"]
    for name, mean in zip(kinds, np.mean(columns, 0), strict=True):
        assert found[name] == pytest.approx(mean, rel=1e-5), name
    moments = [part for points in map(torch.cat, features) for part in (points.mean(0), torch.cov(points.T))]
    assert found["rFID"] == pytest.approx(fid.frechet_distance(*moments), rel=1e-5)
    assert found["bits per pixel"] == 10 * tokens / pixels > 10 / 4 and found["pictures"] == 5
    assert "mini-batches of 1; mean over pictures" in words
    assert "original size, zero padding to multiples of 2 cut off again, batch 1" in words
    assert json.loads((tmp_path / "out" / "config.json").read_text())["batch"] == 1


def test_saved_pictures_of_a_fixed_size(evaluate, files, tmp_path):
    found = evaluate("--save-pictures", tmp_path / "saved")
    y, _ = rebuilt(files.average, centre_crops(files))
    saved = [np.asarray(Image.open(tmp_path / "saved" / f"{number}.png")) for number in range(6)]
    assert np.array_equal(np.stack(saved), (255 * (y + 1) / 2).to(torch.uint8).permute(0, 2, 3, 1))
    images = centre_crops(files)
    error = errors(images - ((images >= 1) & (images <= 95)).byte(), (255 * (y + 1) / 2).to(torch.uint8))
    note = found["notes"]["PSNR published"]
    assert note == f"dB, mean over mini-batches of 4; mean over pictures {(-10 * np.log10(error)).mean():.4f}"


def test_a_page_of_some_pairs(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_tokenizer, "LIMIT", 2)
    monkeypatch.setattr("page.LIMIT", 2)
    monkeypatch.setattr(eval_tokenizer, "rebuild", lambda tokenizer, x: (x, torch.zeros(len(x), 16, 16).long()))
    evaluate("--rounding", "--html", tmp_path / "x.html")
    entries, texts, _ = read_page(tmp_path / "x.html")
    assert [caption for caption, _ in entries] == [f"{i}.png: given back exactly (PSNR infinite)" for i in range(2)]
    assert all(np.array_equal(*pair) for _, pair in entries) and "The first 2 of 6" in texts
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="could not write .*folder: Is a directory"):
        evaluate("--html", tmp_path / "folder")


def test_names_of_saved_pictures(evaluate, tmp_path):
    names = ["a.png", "b.jpg", "b.png", "b.jpg.bmp", "c/b.jpg", "x.y.tif", "d/b.PNG"]
    expected = ["a.png", "b.jpg.png", "b.png.png", "b.jpg.bmp.png", "c/b.png", "x.y.png", "d/b.png"]
    for number, name in enumerate(names):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8 + number)).save(tmp_path / "d" / name)
    for size, height in (("original", len(names)), (8, 0)):
        saved = tmp_path / f"{size}"
        evaluate("--data", tmp_path / "d", "--size", size, "--save-pictures", saved)
        assert {str(path.relative_to(saved)) for path in saved.rglob("*.png")} == set(expected)
        for number, name in enumerate(expected):
            assert Image.open(saved / name).size == (8, 8 + min(number, height))
    evaluate("--data", "glyphs:2", "--save-pictures", tmp_path / "glyphs")
    assert sorted(os.listdir(tmp_path / "glyphs")) == ["glyph 0.png", "glyph 1.png"]


def test_originals_are_never_written_over(evaluate, files, tmp_path):
    (tmp_path / "link").symlink_to(files.folder / "pictures")
    for folder in (files.folder / "pictures", files.folder / "pictures" / "new", tmp_path / "link"):
        with pytest.raises(UserError, match="would write among --data; give another folder$"):
            evaluate("--save-pictures", folder)
    # Originals that --data reaches through links: to their folder, and to one of them.
    (tmp_path / "views").mkdir()
    (tmp_path / "views" / "pictures").symlink_to(files.folder / "pictures")
    (tmp_path / "view").mkdir()
    (tmp_path / "view" / "0.png").symlink_to(files.folder / "pictures" / "0.png")
    for view, folder in (("views", files.folder), ("view", files.folder / "pictures")):
        with pytest.raises(UserError, match="would write among --data; give another folder$"):
            evaluate("--data", tmp_path / view, "--save-pictures", folder)
    assert sorted(os.listdir(files.folder / "pictures")) == [f"{number}.png" for number in range(6)]
    (tmp_path / "file").write_text("")
    flags = ["--size", "original", "--workers", 0, "--out", tmp_path / "out", "--save-pictures", tmp_path / "file"]
    line = fails_with_one_line("eval_tokenizer.py", *named(files), *flags)
    assert line == f"eval_tokenizer.py: cannot read or write {tmp_path / 'file'}: File exists"


@pytest.mark.parametrize(
    "size, vgg, alex", [(14, False, False), (16, True, False), (30, True, False), (32, True, True)]
)
def test_crops_too_small_for_a_measure_leave_it_out(evaluate, files, size, vgg, alex):
    flags = ["--lpips-vgg", files.folder / "vgg.pt", "--lpips-alex", files.folder / "alex.pt", "--size", size]
    found = evaluate(*flags)
    for name, there, least in (("LPIPS VGG", vgg, 16), ("LPIPS AlexNet", alex, 31)):
        assert found[name] > 0 if there else found[name] == f"not computed (it needs {least} pixels a side)"


def test_pictures_too_small_for_a_measure_are_named_and_counted(tmp_path, evaluate, files, monkeypatch):
    """Where one needs 7 pixels, 16 or 31, and the decoder two tokens."""
    flags = ["--data", tmp_path / "d", "--size", "original"]
    (tmp_path / "d").mkdir()
    for width, height in [(7, 8), (6, 99), (15, 99), (16, 16), (30, 31), (31, 40)]:
        Image.new("L", (width, height)).save(tmp_path / "d" / f"{width}.png")
    monkeypatch.setattr(data, "BAD_SHARE", 1)
    vgg, alex = ["--lpips-vgg", files.folder / "vgg.pt"], ["--lpips-alex", files.folder / "alex.pt"]
    for more, count in ([], 5), (vgg, 3), (vgg + alex, 1):
        found = evaluate(*flags, *more)
        assert found["pictures"] == count and found["notes"]["pictures"] == f"{6 - count} unreadable ones left out"
    monkeypatch.setattr(data, "BAD_SHARE", 0.01)
    with pytest.raises(UserError, match="6.png .it is 6x99, smaller than 7x7..; repair"):
        evaluate(*flags)
    large = Tokenizer(TokenizerConfig(32, (1, 1, 1, 1), 1, bits=10))  # by 8
    torch.save({"kind": "tokenizer", "config": vars(large.config), "tokenizer": large.state_dict()}, tmp_path / "8.pt")
    (tmp_path / "d" / "6.png").unlink()
    with pytest.raises(UserError, match="7.png .it is 7x8, smaller than 7x9..; repair"):
        evaluate(*flags, "--tokenizer", tmp_path / "8.pt")


def test_what_the_user_gets_wrong(evaluate, files, tmp_path):
    tokenizer = str(files.folder / "tokenizer.pt")
    for flags, words in [
        (["--size", "33"], "not a multiple of 2"),
        (["--inception", tokenizer], "does not hold the Inception network"),
        (["--inception", "absent.pth"], "no file absent.pth"),
        (["--lpips-vgg", str(files.folder / "alex.pt")], "LPIPS weights"),
        (["--lpips-alex", "absent.pt"], "no file absent.pt"),
        (["--precision", "fp8"], "unknown precision"),
        (["--size", "original", "--data", "glyphs:9"], "glyphs need an image size of at least 16, not original"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            evaluate(*flags)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()  # nothing half-written
    absent = ["--tokenizer", tokenizer, "--data", tmp_path / "absent"]
    assert "no picture folder" in fails_with_one_line("eval_tokenizer.py", *absent)
    line = fails_with_one_line("eval_tokenizer.py", *absent, "--size", "large")
    assert "argument --size: invalid int or 'original' value: 'large'" in line
