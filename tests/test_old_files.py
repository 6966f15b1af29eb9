"""Checkpoints, code caches and statistics of commit 5022a31, the first version of this project, still open, and give what
that commit made of them. How they were made: written_by_5022a31/make.py."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import log_lines, run

from ar_model import load_ar
from data import open_codes
from tokenizer import load_tokenizer

TOKENIZER = "--data glyphs:40:ABCD --size 16 --channels 32 --multipliers 1 1 --blocks 1 --bits 4 --ema 0.5 --lr 1e-3"
TOKENIZER += " --global-batch 8 --micro-batch 4 --workers 0 --steps 4 --log-every 1 --save-every 2 --eval-every 4"
AR = "--width 16 --heads 2 --spatial-layers 1 --intra-layers 1 --pre-bits 2 --dropout 0.1 --lr 3e-2"
AR += " --global-batch 8 --micro-batch 4 --steps 4 --log-every 1 --save-every 2 --eval-every 4"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(Path(__file__).parent / "written_by_5022a31" / "files.tar.xz") as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # not in the first releases of Python 3.11
        archive.extractall(folder)
    yield folder
    shutil.rmtree(folder)  # zeros of 160 MB


@pytest.fixture(scope="module")
def expected(files):
    return torch.load(files / "expected.pt", weights_only=True)


@pytest.mark.parametrize("name, ema", [("average", True), ("raw", False)])
def test_tokenizer_gives_the_same_codes_and_pictures(files, expected, name, ema):
    tokenizer = load_tokenizer(files / "tokenizer", ema=ema)
    with torch.no_grad():
        assert torch.equal(tokenizer.encode(expected[name]["images"]), expected[name]["indices"])
        decoded = tokenizer.decode(expected[name]["indices"])
    torch.testing.assert_close(decoded, expected[name]["decoded"], rtol=1e-4, atol=1e-5)


def test_transformer_gives_the_same_logits_and_draws(files, expected):
    model, tokenizer = load_ar(files / "ar")
    old = expected["ar"]
    assert model.class_names == ["cat", "dog", "owl"]
    with torch.no_grad():
        logits = model([old["pre"], old["post"]], old["labels"])
        drawn = model.generate(old["labels"], cfg_scale=(2.0, 1.5), seeds=[5, 6, 7, 8, 9])
        decoded = tokenizer.decode(drawn[:1].view(1, 8, 8))
    torch.testing.assert_close(list(logits), list(old["logits"]), rtol=1e-4, atol=1e-6)
    assert torch.equal(drawn, old["drawn"])
    torch.testing.assert_close(decoded, old["decoded"], rtol=1e-4, atol=1e-5)


def test_code_cache_gives_the_same_batch(files, expected):
    codes, old = open_codes(files / "codes"), expected["codes"]
    assert codes.classes == ["cat", "dog", "owl"]
    indices, labels = codes.batch(old["entries"], seed=0)
    assert torch.equal(indices, old["indices"]) and torch.equal(labels, old["labels"])


@pytest.mark.parametrize(
    "script, name, flags", [("train_tokenizer.py", "tokenizer", TOKENIZER), ("train_ar.py", "ar", AR)]
)
def test_training_goes_on_with_the_same_losses(files, expected, tmp_path, script, name, flags):
    shutil.copytree(files / name, tmp_path / "run")
    codes = ["--codes", files / "codes"] if name == "ar" else []
    assert "resumed" in run(script, *flags.split(), *codes, "--out", tmp_path / "run").stdout
    lines = log_lines(tmp_path / "run")
    assert [line["step"] for line in lines if "lr" in line] == [1, 2, 3, 4]
    lines = [line for line in lines if line["step"] > 2]
    for line, old in zip(lines, expected[f"{name}_log"], strict=True):
        # Float32 rounds by the order of sums, which another CPU or torch may change: at a loss by some 1e-7, and by more
        # two steps of Adam later, which makes full steps of small gradients.
        assert {key: line[key] for key in old} == pytest.approx(old, rel=1e-4)


def test_statistics_give_the_same_numbers(files, expected, tmp_path):
    (tmp_path / "samples").mkdir()
    for level in (140, 151, 153, 155, 157, 159, 161, 250):
        Image.fromarray(np.full((32, 32, 3), level, np.uint8)).save(tmp_path / "samples" / f"{level}.png")
    flags = ["--inception", files / "inception.pth", "--workers", 0]
    run("fid.py", files / "statistics.npz", tmp_path / "samples", *flags, "--json", tmp_path / "fid.json")
    numbers = json.loads((tmp_path / "fid.json").read_text())
    assert {name: numbers[name] for name in expected["fid"]} == pytest.approx(expected["fid"], rel=1e-4)
