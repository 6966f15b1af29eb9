import dataclasses
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from pages import read_page
from PIL import Image
from scripts import fails_with_one_line, run

import data
import runtime
import sample
from ar_model import ARConfig, ARTransformer
from runtime import UserError
from tokenizer import Tokenizer, TokenizerConfig
from video_tokenizer import VideoTokenizer

CONFIG = ARConfig(width=32, heads=2, spatial_layers=1, intra_layers=1, grid=4, num_classes=5)
NAMES = ["A", "B", "cat", "0", "odd/name"]
PAPER_B = {"cfg_scale": (1.9, 2.0)}  # temperature 1, no filter
SHOW = {"cfg_scale": (4.0, 4.0), "top_p": (0.96, 0.96)}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the subprocesses run: sums of other threads round otherwise, and here they would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    model, tokenizer = ARTransformer(CONFIG), Tokenizer(TokenizerConfig(32, (1, 1), 1))
    for head in model.head:  # zero at first: every class and place would look the same
        torch.nn.init.normal_(head.weight, std=0.5)
    return model.eval(), tokenizer.eval()


@pytest.fixture(scope="module")
def files(models, tmp_path_factory):
    """Model files: whole, without tokenizer, without class names; tokenizer files: right, of other bits."""
    folder = tmp_path_factory.mktemp("models")
    model, tokenizer = models
    state = {"config": dataclasses.asdict(tokenizer.config), "state": tokenizer.state_dict()}
    whole = {
        "kind": "ar",
        "step": 1,
        "config": dataclasses.asdict(CONFIG),
        "model": model.state_dict(),
        "class_names": NAMES,
        "tokenizer": state,
    }
    other = Tokenizer(TokenizerConfig(32, (1, 1), 1, bits=10))
    contents = {
        "whole": whole,
        "bare": {**whole, "tokenizer": None},
        "nameless": {**whole, "class_names": None},
        "tokenizer": {"kind": "tokenizer", "config": state["config"], "tokenizer": state["state"]},
        "10bits": {"kind": "tokenizer", "config": dataclasses.asdict(other.config), "tokenizer": other.state_dict()},
        "video": VideoTokenizer(tokenizer.config).state_dict(),
    }
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pt")
    return {name: str(folder / f"{name}.pt") for name in contents}


def inside(monkeypatch, *flags):
    """sample.py's main() in this process: quicker, and its errors are exceptions."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
    sample.main()


@torch.no_grad()
def expected(models, labels, batch, options, seed=0, first=0):
    """The pictures (N, H, W, 3) of `labels`, by the models alone, in batches like the script's."""
    model, tokenizer = models
    pictures = []
    for start in range(0, len(labels), batch):
        part = torch.tensor(labels[start : start + batch])
        seeds = [runtime.seed_of(seed, start + i) for i in range(len(part))]
        images = tokenizer.decode(model.generate(part, **options, seeds=seeds).view(-1, 4, 4))
        pictures.append((255 * (images.clamp(-1, 1) + 1) / 2).floor().byte().movedim(1, -1).numpy())
    return np.concatenate(pictures)


def bytes_below(folder, suffix=".png"):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix == suffix}


def test_npz_is_the_same_from_one_process_and_two(models, files, tmp_path):
    flags = ["--model", files["whole"], "--count", 11, "--batch", 4, "--seed", 5]
    one = run("sample.py", *flags, "--out", tmp_path / "one.npz")
    two = run("sample.py", *flags, "--out", tmp_path / "two.npz", processes=2)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with np.load(tmp_path / "one.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        pictures = file["arr_0"]
    assert pictures.dtype == np.uint8 and pictures.shape == (11, 8, 8, 3)
    np.testing.assert_array_equal(pictures, expected(models, [i % 5 for i in range(11)], 4, PAPER_B, seed=5))
    assert len(np.unique(pictures.reshape(11, -1), axis=0)) == 11
    for done in (one, two):  # and none is made twice
        assert "made 11 pictures in" in done.stdout and "images/s" in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["one.npz", "one.npz.json", "two.npz", "two.npz.json"]
    settings = json.loads((tmp_path / "one.npz.json").read_text())
    assert settings["cfg_scale"] == [1.9, 2.0] and settings["count"] == 11 and settings["seed"] == 5


def test_folder_is_the_same_from_one_process_and_two_and_goes_on(models, files, tmp_path, monkeypatch, capsys):
    flags = ["--model", files["whole"], "--classes", "cat,odd/name", "--batch", 3]
    run("sample.py", *flags, "--count", 7, "--out", tmp_path / "two", processes=2)
    one = tmp_path / "one"
    inside(monkeypatch, *flags, "--count", 5, "--out", one)
    inside(monkeypatch, *flags, "--count", 7, "--out", one)  # more of the same
    assert "made 4 pictures" in capsys.readouterr().out  # batch 3..5 was not complete
    pictures = bytes_below(one)
    assert pictures == bytes_below(tmp_path / "two")
    assert list(pictures)[:2] == ["000000_cat.png", "000001_odd_name.png"] and len(pictures) == 7
    truth = expected(models, [2, 4, 2, 4, 2, 4, 2], 3, PAPER_B)
    for name, picture in zip(pictures, truth):
        np.testing.assert_array_equal(np.asarray(Image.open(one / name)), picture)
    # A missing picture is made again, with its batch; whole batches are left alone.
    (one / "000001_odd_name.png").unlink()
    (one / "000004_cat.png").write_bytes(b"left alone")
    inside(monkeypatch, *flags, "--count", 7, "--out", one)
    assert bytes_below(one) == {**pictures, "000004_cat.png": b"left alone"}
    assert "(4 were there already)" in capsys.readouterr().out
    for change, word in ((["--seed", 1], "seed was 0, is 1"), (["--count", 6], "count was 7, is 6")):
        with pytest.raises(UserError, match=word):
            inside(monkeypatch, *flags, "--count", 7, *change, "--out", one)
    with pytest.raises(UserError, match="not this script's"):
        inside(monkeypatch, *flags, "--count", 7, "--out", tmp_path)


def test_a_long_class_name_is_cut(files, tmp_path, monkeypatch):
    state = torch.load(files["whole"])
    state["class_names"][2] = "\u732b" * 250
    torch.save(state, tmp_path / "model.pt")
    flags = ["--model", tmp_path / "model.pt", "--classes", "2", "--count", 1, "--out", tmp_path / "out"]
    inside(monkeypatch, *flags)
    assert list(bytes_below(tmp_path / "out")) == ["000000_" + "\u732b" * 50 + ".png"]


def test_a_stopped_npz_goes_on(files, tmp_path, monkeypatch, capsys):
    flags = ["--model", files["whole"], "--count", 10, "--batch", 4]
    inside(monkeypatch, *flags, "--out", tmp_path / "whole.npz")
    store, stored = sample.store, []

    def stop_at_the_second(paths, pictures, copied):
        if stored:
            raise KeyboardInterrupt
        stored.append(paths)
        store(paths, pictures, copied)

    out = tmp_path / "stopped.npz"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sample, "store", stop_at_the_second)
        inside(monkeypatch, *flags, "--out", out)
    assert not out.exists()
    capsys.readouterr()
    inside(monkeypatch, *flags, "--out", out)
    assert "made 6 pictures" in capsys.readouterr().out
    assert out.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    # What another run has made is not thrown away.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stored.clear()
        patch.setattr(sample, "store", stop_at_the_second)
        inside(monkeypatch, *flags, "--seed", 1, "--out", out)
    made = bytes_below(tmp_path / "stopped.npz.parts", ".npy")
    with pytest.raises(UserError, match=r"stopped.npz.parts holds pictures of other settings \(--seed was 1, is 0\)"):
        inside(monkeypatch, *flags, "--out", out)
    assert made and bytes_below(tmp_path / "stopped.npz.parts", ".npy") == made


def test_a_run_goes_on_with_a_copy_of_the_model_from_another_place_and_time_zone(files, tmp_path, monkeypatch, capsys):
    """What counts is what a file holds."""
    flags = ["--count", 4, "--batch", 2, "--out", tmp_path / "folder"]
    inside(monkeypatch, "--model", files["whole"], *flags)
    (tmp_path / "folder" / "000003_0.png").unlink()
    monkeypatch.setenv("TZ", "America/New_York")
    copied = shutil.copy(files["whole"], tmp_path / "copy.pt")
    monkeypatch.chdir(tmp_path)
    inside(monkeypatch, "--model", "copy.pt", *flags)
    assert "(2 were there already)" in capsys.readouterr().out
    state = torch.load(copied)
    state["model"]["norm.weight"] += 1e-3
    torch.save(state, copied)
    with pytest.raises(UserError, match=r"other settings \(model of other contents\)"):
        inside(monkeypatch, "--model", "copy.pt", *flags)


@pytest.mark.parametrize("text", ["[]", "5", '{"count": "x"}', "{", "[" * 20000, "\udcff"])
def test_settings_of_another_make_are_refused(text, files, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"config.json is not settings of sample.py, or it is damaged") as error:
        inside(monkeypatch, "--model", files["whole"], "--count", 1, "--out", tmp_path)
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["config.json"]


def test_another_tokenizer_is_named(models, files, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other.pt"
    state = {name: value + 1e-3 for name, value in models[1].state_dict().items()}
    config = dataclasses.asdict(models[1].config)
    torch.save({"kind": "tokenizer", "config": config, "tokenizer": state}, other)
    for path, said in ((other, True), (files["tokenizer"], False)):
        flags = ["--count", 1, "--tokenizer", path, "--out", tmp_path / f"{said}.npz"]
        inside(monkeypatch, "--model", files["whole"], *flags)
        assert (f"warning: {path} is another tokenizer than" in capsys.readouterr().out) == said


def test_grid(models, files, tmp_path, monkeypatch):
    """A row a class in the order asked; a name goes before a number: "0" is the class named so, 1 is B."""
    out = tmp_path / "new" / "grid.png"
    flags = ["--model", files["whole"], "--classes", "cat,0,1", "--per-class", 2, "--out", out]
    done = run("sample.py", *flags)
    assert "rows: cat, 0, B" in done.stdout
    sheet = np.asarray(Image.open(out))
    truth = expected(models, [2, 3, 1, 2, 3, 1], 50, SHOW)
    assert sheet.shape == (3 * 8 + 2 * 2, 2 * 8 + 2, 3)  # two pixels between neighbours
    for i, picture in enumerate(truth):
        top, left = i % 3 * 10, i // 3 * 10
        np.testing.assert_array_equal(sheet[top : top + 8, left : left + 8], picture)
    # Left open: all classes of a small model, 8 columns. A count that does not fill it: its end stays empty.
    inside(monkeypatch, "--model", files["whole"], "--out", out)
    assert Image.open(out).size == (8 * 10 - 2, 5 * 10 - 2)
    inside(monkeypatch, "--model", files["whole"], "--classes", "A,B", "--count", 3, "--out", out)
    assert (np.asarray(Image.open(out))[10:, 10:] == 230).all()


def test_pages_show_what_the_other_outputs_hold(files, tmp_path, monkeypatch):
    state = torch.load(files["whole"])
    state["class_names"][2] = '<b>&"x'
    torch.save(state, tmp_path / "model.pt")
    flags = ["--model", tmp_path / "model.pt", "--classes", "2,B", "--seed", 7, "--batch", 3, "--preset", "paper"]
    flags += ["--count", 6, "--html"]
    for out in ("a.npz", "b.png", "c"):
        inside(monkeypatch, *flags, "--out", tmp_path / out)
    truth = np.load(tmp_path / "a.npz")["arr_0"]
    names = ['<b>&"x', "B"] * 3
    for out in ("a.npz", "b.png", "c"):
        entries, texts, _ = read_page(tmp_path / f"{out}.html")
        assert [caption for caption, _ in entries] == [f"{i}: {name}, --seed 7" for i, name in enumerate(names)]
        np.testing.assert_array_equal([picture for _, (picture,) in entries], truth)
        assert "6 of 6" in texts
    # Of another place, and of pictures that were there before; of some of them.
    monkeypatch.setattr("page.LIMIT", 4)
    inside(monkeypatch, *flags, tmp_path / "page.html", "--out", tmp_path / "c")
    entries, texts, _ = read_page(tmp_path / "page.html")
    np.testing.assert_array_equal([picture for _, (picture,) in entries], truth[:4])
    assert "The first 4 of 6" in texts


def test_a_page_that_cannot_be_written_loses_no_picture(files, tmp_path):
    (tmp_path / "folder").mkdir()
    flags = ["--model", files["whole"], "--count", 2, "--out", tmp_path / "x.npz"]
    line = fails_with_one_line("sample.py", *flags, "--html", tmp_path / "folder")
    assert line.startswith(f"sample.py: could not write {tmp_path / 'folder'}: Is a directory")
    assert "(2 were there already)" in run("sample.py", *flags).stdout


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with three pictures of the size that `models` make, one of them deeper; the same as a tensor."""
    folder = tmp_path_factory.mktemp("photos")
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    (folder / "c").mkdir()
    for name, image in zip(("a.png", "b.png", "c/c.png"), images):
        Image.fromarray(image).save(folder / name)
    return folder, torch.from_numpy(images).movedim(-1, 1)


@torch.no_grad()
def completed(models, photos, rows, labels, classes, batch, options, seed=0):
    """As `expected`, going on from photos (M, 3, H, W): the tokens put together and decoded by hand."""
    model, tokenizer = models
    codes = torch.cat([tokenizer.encode(photo[None].float() / 127.5 - 1) for photo in photos])  # (M, 4, 4)
    pictures = []
    for start in range(0, len(labels), batch):
        places = range(start, min(start + batch, len(labels)))
        kept = codes[[i // classes % len(photos) for i in places], :rows]
        seeds = [runtime.seed_of(seed, i) for i in places]
        drawn = model.generate(torch.tensor([labels[i] for i in places]), **options, seeds=seeds, given=kept.flatten(1))
        tokens = torch.cat([kept, drawn.view(-1, 4, 4)[:, rows:]], 1)
        images = tokenizer.decode(tokens)
        pictures.append((255 * (images.clamp(-1, 1) + 1) / 2).floor().byte().movedim(1, -1).numpy())
    return np.concatenate(pictures)


def test_going_on_from_given_pictures_is_the_same_from_one_process_and_two(
    models, files, photos, tmp_path, monkeypatch
):
    folder, images = photos
    flags = ["--model", files["whole"], "--classes", "cat,0", "--given", folder, "--batch", 4, "--seed", 5]
    run("sample.py", *flags, "--count", 9, "--out", tmp_path / "two.npz", processes=2)
    inside(monkeypatch, *flags, "--count", 9, "--out", tmp_path / "one.npz")
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    labels = [2, 3, 2, 3, 2, 3, 2, 3, 2]
    truth = completed(models, images, 2, labels, 2, 4, PAPER_B, seed=5)
    np.testing.assert_array_equal(np.load(tmp_path / "one.npz")["arr_0"], truth)
    assert (truth != expected(models, labels, 4, PAPER_B, seed=5)).any((1, 2, 3)).all()
    # A folder; left open, as many a class as there are pictures to go on from.
    inside(monkeypatch, *flags, "--given-rows", 3, "--out", tmp_path / "folder")
    made = sorted((tmp_path / "folder").glob("*.png"))
    made = np.stack([np.asarray(Image.open(path)) for path in made])
    np.testing.assert_array_equal(made, completed(models, images, 3, labels[:6], 2, 4, PAPER_B, seed=5))
    settings = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert settings["given_rows"] == 3 and settings["given"] == str(folder) and len(settings["given_hash"]) == 64


def test_a_grid_has_a_column_for_each_given_picture(tmp_path, monkeypatch):
    """Built-in ones; and of more than are needed no other is read."""
    torch.manual_seed(0)
    model, tokenizer = ARTransformer(CONFIG).eval(), Tokenizer(TokenizerConfig(32, (1, 1, 1), 1)).eval()
    for head in model.head:
        torch.nn.init.normal_(head.weight, std=0.5)
    state = {"config": dataclasses.asdict(tokenizer.config), "state": tokenizer.state_dict()}
    content = {"kind": "ar", "config": dataclasses.asdict(CONFIG), "model": model.state_dict(), "class_names": NAMES}
    torch.save({**content, "step": 1, "tokenizer": state}, tmp_path / "model.pt")
    flags, out = ["--model", tmp_path / "model.pt", "--given-rows", 1], tmp_path / "grid.png"
    inside(monkeypatch, *flags, "--given", "glyphs:3:AB", "--out", out)
    glyphs = data.open_pictures("glyphs:3:AB", 16, train=False)
    images = torch.stack([glyphs[0, i][0] for i in range(3)])
    sheet = np.asarray(Image.open(out))
    assert sheet.shape == (5 * 18 - 2, 3 * 18 - 2, 3)
    truth = completed((model, tokenizer), images, 1, [i % 5 for i in range(15)], 5, 50, SHOW)
    for i, picture in enumerate(truth):
        top, left = i % 5 * 18, i // 5 * 18
        np.testing.assert_array_equal(sheet[top : top + 16, left : left + 16], picture)
    read, read_batch = [], data.read_batch
    monkeypatch.setattr(sample, "read_batch", lambda photos, at: read.extend(at) or read_batch(photos, at))
    inside(monkeypatch, *flags, "--given", "glyphs:50000:AB", "--per-class", 3, "--out", tmp_path / "again.png")
    assert read == [(0, 0), (0, 1), (0, 2)]
    assert (tmp_path / "again.png").read_bytes() == out.read_bytes()


def test_a_run_goes_on_from_the_same_given_pictures_only(files, photos, tmp_path, monkeypatch, capsys):
    folder, out = photos[0], tmp_path / "out"
    flags = ["--model", files["whole"], "--classes", "A", "--count", 4, "--batch", 2, "--out", out]
    inside(monkeypatch, *flags, "--given", folder)
    (out / "000003_A.png").unlink()
    moved = shutil.copytree(folder, tmp_path / "moved")
    others = shutil.copytree(folder, tmp_path / "others")
    (others / "a.png").rename(others / "another.png")
    for change, words in (
        (["--given", others], "given of other contents"),
        (["--given", folder, "--given-rows", 1], "--given-rows was 2, is 1"),
        (["--given", folder, "--given-rows", 5], "--given is cut by --given-rows, one of 1, 2, 3, 4$"),
        ([], "--given-rows was 2, is 0"),
    ):
        with pytest.raises(UserError, match=words):
            inside(monkeypatch, *flags, *change)
    capsys.readouterr()
    inside(monkeypatch, *flags, "--given", moved)
    assert "(2 were there already)" in capsys.readouterr().out


def test_samples_from_before_given_pictures_go_on_without_them(files, photos, tmp_path, monkeypatch, capsys):
    flags = ["--model", files["whole"], "--count", 4, "--batch", 2, "--out", tmp_path]
    inside(monkeypatch, *flags)
    (tmp_path / "000003_0.png").unlink()
    settings = json.loads((tmp_path / "config.json").read_text())
    settings = {name: value for name, value in settings.items() if not name.startswith("given")}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="--given-rows was False, is 2"):
        inside(monkeypatch, *flags, "--given", photos[0])
    capsys.readouterr()
    inside(monkeypatch, *flags)
    assert "(2 were there already)" in capsys.readouterr().out


def test_an_unreadable_given_picture_ends_every_rank(files, photos, tmp_path, monkeypatch):
    folder, out = shutil.copytree(photos[0], tmp_path / "photos"), tmp_path / "out.npz"
    (folder / "b.png").write_bytes(b"no picture")
    flags = ["--model", files["whole"], "--classes", "A", "--given", folder, "--out", out]
    words = f"b.png of --given {folder} cannot be read: it is not a picture that Pillow reads"
    assert fails_with_one_line("sample.py", *flags).startswith(f"sample.py: {words}")
    lines = run("sample.py", *flags, processes=2, code=2).stderr.splitlines()  # which only the second one reads
    assert [line.split(words)[0] for line in lines] == ["sample.py: ", "sample.py [rank 1]: "]
    assert os.listdir(tmp_path) == ["photos"]
    inside(monkeypatch, *flags, "--count", 1)  # it does not need that one
    assert out.exists()


def test_a_tokenizer_of_ones_own(files, tmp_path, monkeypatch):
    flags = ["--count", 3, "--rounding"]
    inside(monkeypatch, "--model", files["whole"], *flags, "--out", tmp_path / "a.npz")
    inside(
        monkeypatch, "--model", files["bare"], "--tokenizer", files["tokenizer"], *flags, "--out", tmp_path / "b.npz"
    )
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    inside(monkeypatch, "--model", files["whole"], "--count", 3, "--out", tmp_path / "c.npz")
    rounded, truncated = (np.load(tmp_path / name)["arr_0"].astype(int) for name in ("a.npz", "c.npz"))
    assert set(np.unique(rounded - truncated)) == {0, 1}


def test_numbers_beside_names_that_are_numbers_are_named():
    names = ["01", "02", "03"]
    assert sample.choose_classes("02", names, 3) == [1]
    with pytest.warns(UserWarning, match="no class is called 2: number 2 is taken, the class 03"):
        assert sample.choose_classes("2", names, 3) == [2]
    with pytest.raises(UserError, match="unknown class '1111"):
        sample.choose_classes("1" * 5000, names, 3)


def test_presets(files, tmp_path, monkeypatch):
    """The published settings, as the paper's repository states them for each size."""
    assert [sample.PAPER_SIZES.get(width, "B") for width in (1024, 1280, 1536, 32)] == ["B", "L", "XL", "B"]
    published = {"B": [1.9, 2.0, 1.0, 1.0], "L": [1.9, 1.9, 1.1, 1.0], "XL": [1.75, 1.85, 1.1, 1.0]}
    for name, values in published.items():
        preset = sample.PRESETS[name]
        assert [*preset["cfg_scale"], *preset["temperature"]] == values
        assert preset["top_k"] == (0, 0) and preset["top_p"] == (1.0, 1.0)
    flags = ["--model", files["whole"], "--count", 1]
    cases = [
        ("a.png", [], [[4.0, 4.0], [1.0, 1.0], [0, 0], [0.96, 0.96]]),
        ("b.npz", ["--preset", "show", "--top-k", 9, 0], [[4.0, 4.0], [1.0, 1.0], [9, 0], [0.96, 0.96]]),
        ("c.png", ["--preset", "paper", "--cfg", 3, 1], [[3.0, 1.0], [1.0, 1.0], [0, 0], [1.0, 1.0]]),
        ("d.npz", ["--temperature", 0.5, 2, "--top-p", 0.9, 0.8], [[1.9, 2.0], [0.5, 2.0], [0, 0], [0.9, 0.8]]),
    ]
    for name, more, values in cases:
        inside(monkeypatch, *flags, *more, "--out", tmp_path / name)
        settings = json.loads((tmp_path / f"{name}.json").read_text())
        assert [settings[key] for key in ("cfg_scale", "temperature", "top_k", "top_p")] == values, name


def test_numbers_of_pictures_and_classes(monkeypatch):
    assert sample.choose_classes(None, None, 1000) == list(range(1000))
    assert sample.choose_classes("all", None, 1000) == list(range(1000))
    spread = sample.choose_classes(None, None, 1000, spread=True)
    assert len(spread) == 10 and spread[0] == 0 and spread[-1] == 999
    assert sample.choose_classes(None, None, 3, spread=True) == [0, 1, 2]
    assert sample.choose_classes("all", None, 11, spread=True) == list(range(11))
    assert sample.choose_classes("7, 3,7", None, 10) == [7, 3, 7]
    with pytest.raises(UserError, match="unknown class '10'; known are all, the numbers 0 to 9$"):
        sample.choose_classes("10", None, 10)
    with pytest.raises(UserError, match="0 to 4, A, B, cat, 0, odd/name$"):
        sample.choose_classes("A,dog", NAMES, 5)
    seeds = [runtime.seed_of(seed, i) for seed in (0, 1) for i in range(1000)]
    assert len(set(seeds)) == 2000 and 0 <= min(seeds) and max(seeds) < 2**63


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--temperature", "0", "1"], "--temperature: must be at least 0.001"),
        (["--top-p", "1.5", "1"], "--top-p: must be at most 1"),
        (["--top-k", "-1", "1"], "--top-k: must be at least 0"),
        (["--cfg", "nan", "1"], "--cfg/--cfg-scale: must be at least -1000"),
        (["--cfg", "1e39", "1"], "--cfg/--cfg-scale: must be at most 1000"),
        (["--temperature", "1e-40", "1"], "--temperature: must be at least 0.001"),
    ],
)
def test_options_out_of_range(flags, word, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--model", "B", "--out", "x.png", *flags])
    with pytest.raises(SystemExit, match="2"):
        sample.parse()
    (line,) = capsys.readouterr().err.splitlines()
    assert word in line


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--classes", "dog"], "unknown class 'dog'"),
        (["--classes", "-1"], "unknown class '-1'"),
        (["--model", "bare"], "bare.pt carries no tokenizer"),
        (["--tokenizer", "10bits"], "have 10 bits, those of .* 18"),
        (["--tokenizer", "video"], "video.pt one is of videos, the other of images; name the one it was trained with"),
        (["--model", "tokenizer"], "is a tokenizer file"),
        (["--tokenizer", "bare"], "no tokenizer"),
        (["--model", "nowhere.pt"], "no file or folder nowhere.pt; released names: B, L, XL"),
        (["--out", "x.jpg"], "ending in .png or .npz"),
        (["--precision", "int8"], "unknown precision 'int8'"),
        (["--given-rows", "2"], "--given-rows and --given-frames go with --given"),
        (["--given", "glyphs:3", "--given-frames", "1"], "--given is cut by --given-rows, one of 1, 2, 3, 4"),
        (["--frames", "5"], "--frames is of clips, and this model draws pictures"),
        (["--out", "x.webp"], "whole.pt draws pictures, for --out .png"),
        (["--given", "glyphs:3"], "glyphs need an image size of at least 16, not 8"),
        (["--given", "nowhere"], "no picture folder nowhere that can be read"),
        (["--given", "."], "holds no pictures"),
    ],
)
def test_errors(flags, word, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [files.get(flag, flag) for flag in flags]
    with pytest.raises(UserError, match=word) as error:
        inside(monkeypatch, "--model", files["whole"], "--count", 1, "--out", "x.npz", *flags)
    assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("flags", [["--count", "0"], ["--batch", "0"], ["--seed", "-1"], ["--per-class", "0"]])
def test_flags_out_of_range(flags, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        inside(monkeypatch, "--model", "x", "--out", "y", *flags)
    assert stop.value.code == 2 and f"{flags[0]}: must be at least" in capsys.readouterr().err


def test_an_error_is_one_line_and_exit_code_2(files, tmp_path):
    line = fails_with_one_line("sample.py", "--model", files["bare"], "--out", tmp_path / "x")
    assert line.startswith("sample.py: ")
    assert not (tmp_path / "x").exists()


def test_output_kinds(tmp_path):
    kinds = [sample.output(name)[1] for name in ("a.png", "b.NPZ", "c", "d.v2", "e.WebP")]
    assert kinds == ["grid", "npz", "folder", "folder", "grid"]
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for name in ("file", "folder.png"):
        with pytest.raises(UserError, match=name):
            sample.output(tmp_path / name)
