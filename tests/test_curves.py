import json
import os

import numpy as np
import pytest
from PIL import Image
from scripts import fails_with_one_line, run

import curves


def log(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.jsonl").write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    )
    return folder


def test_what_is_read_of_a_log(tmp_path):
    """Damaged lines and what is not finite are passed over; names stand in order of first appearance."""
    lines = [
        {"step": 1, "b": 2.5, "a": "nan"},
        {"step": 2, "val_a": 3},
        "{torn\n",
        "[1]\n",
        '{"a": 7}\n',
        "\n",
        '"step"\n',
    ]
    lines += [
        {"step": "x", "a": 1},
        {"step": 3, "a": -1.5, "b": None},
        {"step": 4, "b": 0.0, "a": 10**400},
        '{"step": 5, "b"',
    ]
    found = curves.read_log(log(tmp_path, lines))
    assert list(found.items()) == [("b", [(1, 2.5), (4, 0.0)]), ("val_a", [(2, 3)]), ("a", [(3, -1.5)])]


def colour_of(i):
    return tuple(bytes.fromhex(curves.COLOURS[i][1:]))


def test_curves_go_through_their_values(tmp_path):
    """A panel a quantity, a colour a run: where a run has logged a value, a point of its colour lies."""
    one = log(tmp_path / "one", [{"step": step, "loss": 10 - step, "lr": 1e-4} for step in (0, 5, 10)])
    two = log(tmp_path / "two", [{"step": step, "loss": step, "psnr": 30} for step in (0, 5, 10)])
    run("curves.py", one, two, "--out", tmp_path / "x.png")
    sheet = np.asarray(Image.open(tmp_path / "x.png"))
    top = sheet.shape[0] - curves.HEIGHT
    assert sheet.shape[1] == 3 * curves.WIDTH and 0 < top < curves.HEIGHT  # loss, lr, psnr in one row, a legend above

    def at(panel, x, y):  # parts of its axes
        column = panel * curves.WIDTH + curves.LEFT + x * (curves.RIGHT - curves.LEFT)
        return tuple(sheet[round(top + curves.BOTTOM - y * (curves.BOTTOM - curves.TOP)), round(column)].tolist())

    assert [at(0, 0, 1), at(0, 0.25, 0.75), at(0, 1, 0)] == [colour_of(0)] * 3
    assert [at(0, 0, 0), at(0, 0.25, 0.25), at(0, 1, 1)] == [colour_of(1)] * 3
    assert at(1, 0.5, 0.5) == colour_of(0) and at(2, 0.5, 0.5) == colour_of(1)
    panels = [sheet[top:, i * curves.WIDTH : (i + 1) * curves.WIDTH] for i in range(3)]
    for i, seen in enumerate([(True, True), (True, False), (False, True)]):
        assert tuple((panels[i] == colour_of(run)).all(2).any() for run in range(2)) == seen
    assert all((sheet[:top] == colour_of(run)).all(2).any() for run in range(2))  # their names


def test_a_run_of_a_training(tmp_path):
    flags = "--data glyphs:60:AB --size 24 --channels 32 --multipliers 1 1 --blocks 1 --global-batch 8 --micro-batch 4"
    run("train_tokenizer.py", *flags.split(), "--workers", 0, "--steps", 4, "--log-every", 1, "--out", tmp_path / "run")
    run("curves.py", tmp_path / "run", "--out", tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size[0] == 3 * curves.WIDTH
    assert {"generator", "val_psnr", "lr", "images_per_second"} < set(curves.read_log(tmp_path / "run"))


def test_names_that_are_not_utf8_and_many_runs(tmp_path):
    lines = [{"step": step, "loss": step} for step in range(30)]
    folders = [log(tmp_path / os.fsdecode(b"caf\xe9%d" % i), lines) for i in range(10)]
    run("curves.py", *folders, "--out", tmp_path / "x.png")
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["absent"], "there is no file absent/log.jsonl"),
        (["file"], "there is no file file/log.jsonl"),
        (["bare"], "there is no file bare/log.jsonl"),
        (["empty"], "empty/log.jsonl holds no values"),
        (["good", "empty"], "empty/log.jsonl holds no values"),
        (["good", "--out", "nowhere/x.png"], "could not write nowhere/x.png: No such file or directory"),
        (["good", "--out", "bare"], "could not write bare: Is a directory"),
        ([], "required: RUN"),
    ],
)
def test_wrong_input_ends_in_one_line(tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    log(tmp_path / "good", [{"step": 1, "loss": 1.0}])
    log(tmp_path / "empty", [{"step": 1, "loss": "nan"}])
    (tmp_path / "bare").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(os.listdir())
    assert words in fails_with_one_line("curves.py", *flags)
    assert sorted(os.listdir()) == before
