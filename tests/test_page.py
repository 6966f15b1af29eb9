import re
import shutil
import subprocess

import numpy as np
import pytest
from pages import read_page
from PIL import Image

import page
from runtime import UserError


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_pictures_and_captions_come_back(tmp_path):
    pictures = [[picture(5, 3)], [picture(300, 200, 1), picture(1, 1, 2)], []]
    captions = ['<b>&"x</b>', "caf\udce9 \u732b", "none"]
    page.write_page(tmp_path / "x.html", "<script>1 & 2", zip(captions, pictures), 3)
    entries, texts, sizes = read_page(tmp_path / "x.html")
    assert [caption for caption, _ in entries] == ['<b>&"x</b>', "caf\\udce9 \u732b", "none"]
    for (_, found), expected in zip(entries, pictures, strict=True):
        for array, original in zip(found, expected, strict=True):
            np.testing.assert_array_equal(array, np.asarray(original))
    assert sizes == [(125, 75), (300, 200), (128, 128)]  # as many times larger as 128 pixels allow
    assert texts.count("<script>1 & 2") == 2 and "3 of 3" in texts


def test_a_page_is_of_the_first_entries_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "LIMIT", 3)
    for count, words in [(2, "2 of 2"), (3, "3 of 3"), (7, "The first 3 of 7"), (12345, "The first 3 of 12,345")]:
        page.write_page(tmp_path / "x.html", "x", ((f"{i}", [picture(2, 2)]) for i in range(count)), count)
        entries, texts, _ = read_page(tmp_path / "x.html")
        assert [caption for caption, _ in entries] == [f"{i}" for i in range(min(count, 3))]
        assert next(text for text in reversed(texts) if text.strip()) == words


def test_what_cannot_be_written_is_said(tmp_path):
    (tmp_path / "x.html").mkdir()
    with pytest.raises(UserError, match="could not write .*x.html: Is a directory"):
        page.write_page(tmp_path / "x.html", "x", [], 0)


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(not BROWSER, reason="needs chromium or google-chrome on PATH")
def test_a_browser_shows_every_picture(tmp_path):
    page.write_page(tmp_path / "x.html", "x", [("a", [picture(4, 4), picture(9, 30)]), ("b", [picture(400, 3)])], 2)
    check = "<script>document.title = [...document.images].map(i => i.complete && i.naturalWidth)</script>"
    (tmp_path / "x.html").write_text((tmp_path / "x.html").read_text() + check)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --virtual-time-budget=5000 --dump-dom"
    command = [BROWSER, *flags.split(), f"--user-data-dir={tmp_path / 'user'}", f"file://{tmp_path / 'x.html'}"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert re.search("<title>(.*?)</title>", shown)[1] == "4,9,400"
