"""docs/reading.md: its snippets run, and what it points to is there; and the snippet about one picture of running.md."""

import ast
import re

import pytest
import torch
from PIL import Image
from scripts import ROOT

PAGE = (ROOT / "docs" / "reading.md").read_text()
BEGINNING, *SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
QUESTIONS = re.findall(r"^## (\d+)\. .*\?$", PAGE, re.MULTILINE)


def test_twelve_questions_of_few_lines():
    assert QUESTIONS == [str(i) for i in range(1, 13)] and len(SNIPPETS) == 12
    assert all(snippet.count("\n") <= 8 for snippet in SNIPPETS)


@pytest.fixture(scope="module")
def beginning():
    names = {}
    exec(compile(BEGINNING, "docs/reading.md", "exec"), names)  # noqa: S102
    return names


@pytest.mark.parametrize("number", range(1, 13))
def test_snippet(number, beginning):
    torch.manual_seed(0)
    exec(compile(SNIPPETS[number - 1], f"docs/reading.md, question {number}", "exec"), dict(beginning))  # noqa: S102


def test_one_picture_of_any_size(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "running.md").read_text()
    snippet = page[page.index("## One picture of any size") :].split("```")[1].removeprefix("python\n")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (61, 50), "red").save("cat.jpg")
    exec(snippet.replace("256_L", "emoji"), {})  # noqa: S102
    assert Image.open("cat_rebuilt.png").size == (61, 50)


def test_what_it_points_to_is_there():
    found = re.findall(r"`(\w+\.py)`: ((?:`[\w.]+`(?:, )?)+)", PAGE)
    assert len(found) == PAGE.count(".py`: `") > 15
    for file, names in found:
        tree = ast.parse((ROOT / file).read_text())
        for name in re.findall(r"`([\w.]+)`", names):
            body = tree.body
            for part in name.split("."):
                body = next(node.body for node in body if getattr(node, "name", None) == part)
