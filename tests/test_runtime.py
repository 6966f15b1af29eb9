"""Launching, flags, messages, files: what every script shares."""

import os
import re

import pytest
import torch
from scripts import ROOT, fails_with_one_line, run

import encode
import runtime
import train_ar
import train_tokenizer


@pytest.mark.parametrize(
    "script, flag, wrong",
    [(train, flag, wrong)
     for train in (train_tokenizer, train_ar)
     for flag, wrong in [
        ("--global-batch", "0"), ("--global-batch", "-16"), ("--micro-batch", "0"), ("--log-every", "0"),
        ("--save-every", "0"), ("--eval-every", "-1"), ("--eval-pictures", "0"), ("--keep-every", "-1"),
        ("--steps", "-3"), ("--epochs", "-1"), ("--lr", "-1"), ("--lr", "nan"), ("--lr", "inf"), ("--seed", "-1"),
     ]]
    + [(train_tokenizer, "--workers", "-1"), (train_tokenizer, "--ema", "1.5"), (train_tokenizer, "--size", "0")]
    + [(train_tokenizer, "--gan-weight", "-1"), (train_tokenizer, "--lr-drops", "-1")]
    + [(train_ar, "--warmup-epochs", "nan"), (encode, "--workers", "-1"), (encode, "--crops", "-1")]
    + [(encode, "--batch", "0")],
)  # fmt: skip
def test_numbers_out_of_range_are_named(script, flag, wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse([flag, wrong])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1
    assert f"argument {flag}: must be " in line and line.endswith(f"not {wrong} (see --help)\n")


@pytest.mark.parametrize("flag", ["--lr", "--ema", "--seed", "--steps"])
def test_numbers_at_the_edge_are_taken(flag):
    assert getattr(train_tokenizer.parse([flag, "0"]), flag.removeprefix("--")) == 0


def test_help_shows_defaults_of_zero():
    assert re.search(
        r"--seed SEED +of initialisation, order, crops \(default: 0\)", run("train_tokenizer.py", "--help").stdout
    )


@pytest.mark.parametrize(
    "variables",
    [{"RANK": "abc"}, {"RANK": "1"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"LOCAL_RANK": "z"}, {"WORLD_SIZE": "x"}]
    + [{"WORLD_SIZE": number} for number in ("0", "-1", "2.5", "1" * 5000, "2")],
)  # fmt: skip
def test_variables_that_no_launcher_sets_are_named(variables, monkeypatch):
    """The last of them: without the address of the first process."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(runtime.UserError, match="launch with torchrun") as error:
        runtime.start()
    assert all(name in str(error.value) for name in variables)


@pytest.mark.parametrize("precision", ["bf16", "fp32", None])
def test_float32_means_float32_in_every_run(precision):
    cpu = torch.device("cpu")
    switches = runtime.rounding_switches(cpu)
    with runtime.exact_float32(cpu):  # which leaves the switches as they were
        for switch in switches:
            setattr(*switch, True)
        assert runtime.set_precision(runtime.Runtime(cpu), precision) == (precision or "fp32")
        assert not any(getattr(*switch) for switch in switches)


def test_absent_unreadable_and_damaged_files_are_told_apart(tmp_path):
    def read(path, error=None):
        with pytest.raises(runtime.UserError) as found, runtime.reading(path, "a log"):
            raise error or AssertionError("nothing is read")
        assert "\n" not in str(found.value) and str(path) in str(found.value)
        return type(found.value), str(found.value)

    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    assert "there is no file" in read(tmp_path / "absent")[1]
    assert "no plain file" in read(tmp_path / "pipe")[1] and "no plain file" in read(tmp_path)[1]
    for error in (OSError(5, "Input/output error"), MemoryError(), RuntimeError("can't allocate memory: 9 bytes")):
        assert read(tmp_path / "file", error)[0] is runtime.UserError
    for error in (ValueError("line 1\nline 2"), KeyError("step"), RecursionError(), EOFError()):
        kind, words = read(tmp_path / "file", error)
        assert kind is runtime.Damaged and "is not a log, or it is damaged: " in words


def test_control_characters_are_spelt_out():
    assert runtime.printable("a\x1b[31m\x9b\tb\n\u732b") == "a\\x1b[31m\\x9b\tb\n\u732b"


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "x.png").write_bytes(b"before")
    with pytest.raises(OSError, match="no space"), runtime.replacing(tmp_path / "x.png") as file:
        file.write(b"half")
        raise OSError("no space")
    assert os.listdir(tmp_path) == ["x.png"] and (tmp_path / "x.png").read_bytes() == b"before"


def test_nothing_is_written_through_a_link(tmp_path):
    """Neither one in the file's place nor one in its temporary file's."""
    (tmp_path / "other").write_bytes(b"mine")
    (tmp_path / "x").symlink_to("other")
    (tmp_path / "x.tmp").symlink_to("other")
    runtime.write_json(tmp_path / "x", "text")
    assert (tmp_path / "other").read_bytes() == b"mine" and (tmp_path / "x").read_text() == '"text"\n'
    assert sorted(os.listdir(tmp_path)) == ["other", "x"] and not (tmp_path / "x").is_symlink()


FORBIDDEN = """
import sys
sys.path.insert(0, {root!r})
import runtime

runtime.run_script(lambda: open({path!r}, "w"))
"""


def test_a_file_that_may_not_be_written_ends_in_one_line(tmp_path):
    (tmp_path / "it.py").write_text(FORBIDDEN.format(root=str(ROOT), path=str(tmp_path)))
    line = f"it.py: cannot read or write {tmp_path}: Is a directory"
    assert fails_with_one_line(tmp_path / "it.py") == line


SPENT = """
import sys
sys.path.insert(0, {root!r})
import torch, runtime

def main():
    try:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    finally:
        {then}

runtime.run_script(main)
"""


@pytest.mark.parametrize("then", ["pass", "raise RuntimeError('the recording of a graph failed')"])
def test_spent_memory_ends_in_one_line(tmp_path, then):
    """Also where it makes something else fail on the way out, as it does while a CUDA graph is recorded."""
    (tmp_path / "train_it.py").write_text(SPENT.format(root=str(ROOT), then=then))
    line = "train_it.py: out of memory; give a smaller --batch or --micro-batch: CUDA out of memory."
    assert fails_with_one_line(tmp_path / "train_it.py") == f"{line} Tried to allocate 2 GiB"
