"""Every fault here is really caused: processes are killed, disks filled, files damaged. `stress.py` kills for
longer."""

import functools
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import Forked, assert_equal, command, environment, fails_with_one_line, log_lines, run, server, wait_for
from stress import AR, TOKENIZER, children, compare, torture
from torch.optim.optimizer import register_optimizer_step_post_hook

import checkpoint
import data
import runtime
import training

TOKENIZER = TOKENIZER.replace("--workers 1", "--workers 0").replace("--save-every 3", "--save-every 1").split()
AR = AR.replace("--save-every 3", "--save-every 1").split()


def fill_disk(file_limit):
    """No file may grow past so many bytes: writes fail as they do on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))


def refused(script, *flags, **options):
    """The last line on stderr of a script that ends in exit code 2; warnings may come before it."""
    errors = run(script, *flags, code=2, **options).stderr
    assert "Traceback" not in errors, errors
    return errors.splitlines()[-1]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of stage I, checkpoints of steps 3 and 4."""
    out = tmp_path_factory.mktemp("run") / "out"
    run("train_tokenizer.py", *TOKENIZER, "--steps", 4, "--out", out)
    return out


@pytest.fixture(scope="module")
def codes(run_folder):
    """60 glyphs encoded by that run's tokenizer."""
    out = run_folder.parent / "codes"
    flags = ["--tokenizer", run_folder, "--data", "glyphs:60:AB", "--size", 16, "--workers", 0]
    run("encode.py", *flags, "--out", out)
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Kills


@pytest.mark.parametrize("name, processes, kills", [("train_tokenizer.py", (1, 2), 3), ("train_ar.py", (1,), 2)])
def test_killed_at_random_moments_it_ends_as_if_it_had_not_been(name, processes, kills, codes, tmp_path):
    flags = TOKENIZER if name == "train_tokenizer.py" else ["--codes", codes, "--val-codes", codes, *AR]
    found = torture(name, flags, tmp_path, kills, seed=1, processes=processes, steps=12, start=Forked)
    assert found["equal"] is True and found["restarts"] == kills, found


STATE = {"kind": "tokenizer", "weights": {"w": torch.arange(3000.0), "b": torch.ones(7)}, "settings": {"a": 1}}


def _save_and_die(folder, length):
    """Save step 2 and be killed once `length` bytes are on file."""
    really_save = torch.save

    def save(content, file):
        class Deadly:
            def write(self, part):
                left = length - file.tell()
                file.write(bytes(part)[: max(left, 0)])
                if len(part) >= left:
                    file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
                return len(part)

            def flush(self):
                pass

        really_save(content, Deadly())

    torch.save = save
    checkpoint.save_checkpoint(folder, {**STATE, "step": 2})


def test_killed_in_the_middle_of_a_save(tmp_path):
    whole = checkpoint.save_checkpoint(tmp_path, {**STATE, "step": 1})
    before = whole.read_bytes()
    rng = random.Random(0)
    for length in [1, *rng.sample(range(2, len(before) - 1), 9)]:
        child = server().Process(target=_save_and_die, args=(tmp_path, length))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        scratch = tmp_path / "step_00000002.pt.tmp"
        assert scratch.stat().st_size == length
        path, state = checkpoint.load_latest(runtime.Runtime(torch.device("cpu")), tmp_path, "tokenizer")
        assert path == whole and whole.read_bytes() == before
        assert_equal(state, {**STATE, "step": 1})
        assert not scratch.exists()


@pytest.mark.parametrize("restarts", [0, 2])
def test_a_rank_killed_under_torchrun(restarts, run_folder, tmp_path):
    flags = [*TOKENIZER, "--steps", 4, "--save-every", 1, "--out", tmp_path]
    process = Forked("train_tokenizer.py", *flags, processes=2, restarts=restarts)
    wait_for(tmp_path / "step_00000001.pt", process)
    ranks = children(process.pid)
    os.kill(ranks[-1], signal.SIGKILL)
    out, errors = process.communicate(timeout=100)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    if restarts:
        assert process.returncode == 0 and "resumed" in out, errors
        assert compare(run_folder, tmp_path) is True
    else:
        assert process.returncode == 1 and "SIGKILL" in errors
        assert (tmp_path / "step_00000001.pt").exists() and not (tmp_path / "step_00000004.pt").exists()


def test_what_one_rank_alone_finds_wrong_ends_the_other_in_a_line(tmp_path):
    (tmp_path / "other.txt").write_text("of somebody else's")
    flags = ["--model", "emoji", "--count", 2, "--out", tmp_path]
    errors = run("sample.py", *flags, processes=2, code=2).stderr.splitlines()
    assert len(errors) == 2 and str(tmp_path) in errors[0] and "another process has ended" in errors[1], errors


def _join_late():
    """The second rank looks into the store once more, a second after the first one has joined."""
    join = torch.distributed.init_process_group

    def slowly(*args, store, **options):
        join(*args, store=store, **options)
        time.sleep(1)
        store.add("late", 1)

    if os.environ["RANK"] == "1":
        torch.distributed.init_process_group = slowly


def test_a_rank_that_ends_at_once_waits_for_one_that_still_joins(tmp_path):
    flags = ["--micro-batch", 3, "--out", tmp_path / "out"]
    errors = run("train_ar.py", *flags, processes=2, code=2, prepare=_join_late).stderr.splitlines()
    assert len(errors) == 2 and all("--micro-batch 3" in line for line in errors), errors


def test_ranks_end_with_their_torchrun_and_a_signal_to_it_saves(tmp_path):
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = Forked("train_tokenizer.py", *TOKENIZER, "--steps", 1000, "--out", tmp_path, processes=2)
        begun = checkpoint.checkpoints(tmp_path)
        step = int(begun[-1].stem[5:]) if begun else 0
        wait_for(tmp_path / f"step_{step + 2:08d}.pt", process)
        ranks = children(process.pid)
        os.kill(process.pid, number)
        out, _ = process.communicate(timeout=60)
        assert ("stopped by a signal" in out) == (number == signal.SIGTERM)
        for pid in ranks:  # they may need a moment
            for _ in range(100):
                if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split():
                    break
                time.sleep(0.05)
            else:
                raise AssertionError(f"rank {pid} trains on")


def test_a_run_does_not_depend_on_its_terminal(tmp_path):
    """Nobody reads what it says, the terminal hangs up; stdout and stderr are closed from the start."""
    flags = [*TOKENIZER, "--eval-every", 1000, "--steps", 4, "--out"]
    words = command("train_tokenizer.py", *flags, tmp_path / "closed")
    closed = subprocess.Popen(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words], env=environment())
    words = command("train_tokenizer.py", *flags, tmp_path / "left")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    process.stdout.close()
    process.stderr.close()
    wait_for(tmp_path / "left" / "step_00000001.pt", process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0 and closed.wait(60) == 0
    assert compare(tmp_path / "left", tmp_path / "closed") is True
    assert checkpoint.checkpoints(tmp_path / "left")[-1].name == "step_00000004.pt"


@pytest.mark.parametrize("line", ["5", '{"a": 1}', '{"step": "x"}', "\udcff\udcfe", "[" * 20000, '{"step": 9'])
def test_lines_that_are_no_log_lines_are_passed_over(run_folder, tmp_path, line):
    out = shutil.copytree(run_folder, tmp_path / "out")
    with open(out / "log.jsonl", "ab") as log:
        log.write(line.encode(errors="surrogateescape") + b"\n")
    training.rewind_log(out / "log.jsonl", 4)
    assert log_lines(out) == log_lines(run_folder)


def _break_third_step():
    import train_tokenizer

    calls = iter(range(3))

    def update_ema(*arguments):
        if next(calls) == 2:
            raise RuntimeError("something unforeseen")

    train_tokenizer.losses.update_ema = update_ema


def test_an_unforeseen_error_ends_the_process(tmp_path):
    flags = [*TOKENIZER, "--workers", 1, "--steps", 4, "--out", tmp_path / "out"]
    errors = run("train_tokenizer.py", *flags, code=1, prepare=_break_third_step).stderr
    assert "Traceback" in errors and "something unforeseen" in errors


# ----------------------------------------------------------------------------------------------------------------------
# Damaged files


def test_cut_and_flipped_checkpoints_are_passed_over(tmp_path, capsys):
    rt = runtime.Runtime(torch.device("cpu"))
    old = checkpoint.save_checkpoint(tmp_path, {**STATE, "step": 1})
    new = checkpoint.save_checkpoint(tmp_path, {**STATE, "step": 2})
    content, rng = new.read_bytes(), random.Random(0)
    for length in [0, len(content) - 1, *rng.sample(range(1, len(content) - 1), 48)]:
        new.write_bytes(content[:length])
        path, state = checkpoint.load_latest(rt, tmp_path, "tokenizer")
        assert path == old and f"warning: {new} is torn or damaged" in capsys.readouterr().out, length
        assert_equal(state, {**STATE, "step": 1})
    accepted = 0
    for place in rng.sample(range(len(content)), 200):
        damaged = bytearray(content)
        damaged[place] ^= 1 << rng.randrange(8)
        new.write_bytes(damaged)
        path, state = checkpoint.load_latest(rt, tmp_path, "tokenizer")
        # A flip in a stored time or in padding changes nothing that is read; no other may pass.
        assert_equal(state, {**STATE, "step": 2 if path == new else 1})
        assert (path == new) != ("is torn or damaged" in capsys.readouterr().out)
        accepted += path == new
    assert accepted < 40


def test_what_is_kept(tmp_path):
    """Damaged files of later steps, and files of other names, do not push out what was just saved."""
    for name in ("step_00000008.pt", "step_00000009.pt", "step_best.pt", "step_3_copy.pt"):
        (tmp_path / name).write_bytes(b"damaged")
    for step in (4, 5, 6, 7):
        assert checkpoint.save_checkpoint(tmp_path, {**STATE, "step": step}, keep_every=4).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"step_0000000{step}.pt" for step in (4, 6, 7, 8, 9)),
        "step_3_copy.pt",
        "step_best.pt",
    ]


@pytest.mark.parametrize("name", ["codes.bin", "labels.bin", "tokenizer.pt", "manifest.json"])
def test_a_code_cache_cut_short(codes, tmp_path, name):
    cache = shutil.copytree(codes, tmp_path / "cache")
    content = (cache / name).read_bytes()
    (cache / name).write_bytes(content[: len(content) // 2])
    flags = ["--codes", cache, *AR, "--steps", 2, "--out", tmp_path / "out"]
    errors = fails_with_one_line("train_ar.py", *flags)
    assert str(cache) in errors and not (tmp_path / "out").exists()


def test_codes_of_another_tokenizer(codes, tmp_path):
    cache = shutil.copytree(codes, tmp_path / "cache")
    content = checkpoint.read_weights(cache / "tokenizer.pt")
    next(iter(content["tokenizer"].values())).view(-1)[0] += 1e-3
    checkpoint.write_atomically(cache / "tokenizer.pt", content)
    flags = ["--codes", cache, *AR, "--steps", 2, "--out", tmp_path / "out"]
    errors = fails_with_one_line("train_ar.py", *flags)
    assert "tokenizer.pt is not the tokenizer that made these codes" in errors
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_does_not_fit(run_folder, tmp_path):
    out = shutil.copytree(run_folder, tmp_path / "out")
    flags = [*TOKENIZER, "--steps", 4, "--channels", 64, "--out", out]
    assert "--channels was 32, is 64" in fails_with_one_line("train_tokenizer.py", *flags)
    errors = fails_with_one_line("train_tokenizer.py", *flags, "--allow-changes")
    assert "step_00000004.pt does not hold this run's tokenizer" in errors and "has shape" in errors


class Malicious:
    """Makes a folder when a reader executes it."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("form", ["pickle", "zip", "zip of a good one"])
def test_a_malicious_pickle_is_not_executed(run_folder, codes, tmp_path, form):
    mark, out = tmp_path / "executed", tmp_path / "out"
    out.mkdir()
    evil = out / "step_00000009.pt"
    if form == "pickle":
        evil.write_bytes(pickle.dumps(Malicious(mark)))
    elif form == "zip":
        torch.save(Malicious(mark), evil)
    else:
        torch.save({**STATE, "step": 9, "extra": Malicious(mark), "kind": Malicious(mark)}, evil)
    assert zipfile.is_zipfile(evil) == (form != "pickle")
    said = run("train_tokenizer.py", *TOKENIZER, "--steps", 1, "--out", out).stdout
    assert f"warning: {evil} is" in said and "resumed" not in said and not mark.exists()
    flags = ["--data", "glyphs:60:AB", "--size", 16, "--workers", 0, "--out", tmp_path / "codes"]
    texts = [refused("encode.py", "--tokenizer", evil, *flags)]
    texts += [refused("sample.py", "--model", evil, "--out", tmp_path / "samples.png")]
    assert all(str(evil) in text for text in texts) and not mark.exists()


# ----------------------------------------------------------------------------------------------------------------------
# A full disk


@pytest.mark.parametrize("share", [0.001, 0.5, 0.99])
def test_a_full_disk_during_a_save(run_folder, tmp_path, share):
    out = shutil.copytree(run_folder, tmp_path / "out")
    (out / "step_00000004.pt").unlink()
    before = (out / "step_00000003.pt").read_bytes()
    limit = max(int(share * len(before)), 2 * (out / "log.jsonl").stat().st_size)
    flags = [*TOKENIZER, "--steps", 4, "--eval-every", 1000, "--out", out]
    errors = fails_with_one_line("train_tokenizer.py", *flags, prepare=functools.partial(fill_disk, limit))
    assert f"could not write {out / 'step_00000004.pt'}: File too large" in errors
    assert [path.name for path in checkpoint.checkpoints(out)] == ["step_00000003.pt"]
    assert (out / "step_00000003.pt").read_bytes() == before and not list(out.rglob("*.tmp"))
    run("train_tokenizer.py", *flags)  # there is space again
    ours, theirs = (checkpoint.read_weights(folder / "step_00000004.pt") for folder in (out, run_folder))
    for name in ("tokenizer", "tokenizer_ema", "optimizer_tokenizer", "discriminator", "lecam"):
        assert_equal(ours[name], theirs[name], name)


def test_a_full_disk_during_stage_two_and_encoding(run_folder, codes, tmp_path):
    out = tmp_path / "out"
    flags = ["--codes", codes, *AR, "--steps", 2, "--eval-every", 1000, "--out", out]
    errors = fails_with_one_line("train_ar.py", *flags, prepare=functools.partial(fill_disk, 100_000))
    assert f"could not write {out / 'step_00000001.pt'}" in errors and not list(out.rglob("*.tmp"))
    flags = ["--tokenizer", run_folder, "--data", "glyphs:6000:AB", "--size", 16, "--workers", 0]
    limit = (codes / "tokenizer.pt").stat().st_size + 1000
    few, full = tmp_path / "few", functools.partial(fill_disk, 9000)
    errors = fails_with_one_line("encode.py", *flags, "--data", "glyphs:500:AB", "--out", few, prepare=full)
    assert "could not write" in errors and not list(few.glob("*.tmp"))
    enough = functools.partial(fill_disk, limit)
    run("encode.py", *flags, "--data", "glyphs:60:AB", "--out", tmp_path / "few2", prepare=enough)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def odd_pictures(folder):
    """402 pictures of two classes: 4 that cannot be read, and 8 odd ones that can. Returns the names of the first."""
    rng = np.random.default_rng(0)
    for name in "ab":
        (folder / name).mkdir(parents=True)
    for i in range(390):
        levels = rng.integers(0, 256, (26, 26, 3), dtype=np.uint8)
        Image.fromarray(levels).save(folder / "ab"[i % 2] / f"{i:03}.png", compress_level=0)
    whole = (folder / "a" / "000.png").read_bytes()
    bad = {"truncated.png": whole[:700], "empty.png": b"", "text.png": b"this is no picture\n" * 9}
    bad["half.jpg"] = b"\xff\xd8\xff\xe0\x00\x10JFIF"
    for name, content in bad.items():
        (folder / "b" / name).write_bytes(content)
    odd = folder / "a"
    Image.new("CMYK", (30, 30), (9, 99, 9, 0)).save(odd / "cmyk.jpg")
    Image.new("P", (30, 30), 3).save(odd / "palette.png")
    Image.fromarray(np.full((30, 30), 9000, np.uint16)).save(odd / "16bit.png")
    Image.new("RGB", (1, 1), (1, 2, 3)).save(odd / "1pixel.png")
    Image.new("RGB", (20_000, 30), (9, 8, 7)).save(odd / "wide.png")
    Image.new("RGB", (1, 20_000), (9, 8, 7)).save(odd / "high.png")
    Image.new("RGB", (30, 30), (9, 8, 7)).save(odd / "exif.jpg", exif=b"Exif\0\0II*\0\xff\xff")
    Image.new("RGBA", (30, 30), (9, 8, 7, 0)).save(odd / "clear.png")
    return sorted(f"b/{name}" for name in bad)


def test_odd_and_unreadable_pictures(tmp_path):
    bad = odd_pictures(tmp_path / "pictures")
    flags = [*TOKENIZER, "--gan-weight", 0, "--data", tmp_path / "pictures", "--size", 16, "--steps", 0]
    flags += ["--epochs", 1, "--global-batch", 32, "--micro-batch", 32, "--save-every", 99]
    done = run("train_tokenizer.py", *flags, "--out", tmp_path / "run")
    assert "unreadable pictures: 4 (" in done.stdout and "checkpoint" in done.stdout
    named = re.findall(r"unreadable picture skipped: (\S+)", done.stderr)  # once more by the evaluation
    assert sorted(set(named)) == bad
    flags = ["--tokenizer", tmp_path / "run", "--data", tmp_path / "pictures", "--size", 16, "--workers", 0]
    done = run("encode.py", *flags, "--out", tmp_path / "codes")
    assert "unreadable pictures: 4" in done.stdout
    assert sorted(re.findall(r"unreadable picture skipped: (\S+)", done.stderr)) == bad
    assert len(data.open_codes(tmp_path / "codes")) == 398
    (tmp_path / "pictures" / "b" / "fifth.png").write_bytes(b"")  # 5 of 403 are more than 1 %
    line = refused("encode.py", *flags, "--out", tmp_path / "more")
    assert "more than 1% of the 403 pictures" in line


def test_unreadable_validation_pictures_stop_and_samples_do_not_go_through_links(run_folder, tmp_path):
    for i in range(12):
        path = tmp_path / "val" / "a" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(path) if i < 8 else path.write_bytes(b"")
    flags = [*TOKENIZER, "--val-data", tmp_path / "val", "--eval-pictures", 12, "--steps", 5, "--allow-changes"]
    out = shutil.copytree(run_folder, tmp_path / "out")
    victim, picture = tmp_path / "victim", out / "samples" / "step_00000005.png"
    victim.write_bytes(b"mine")
    picture.symlink_to(victim)
    errors = run("train_tokenizer.py", *flags, "--out", out, code=2).stderr
    for i in range(8, 12):
        assert f"warning: unreadable picture skipped: a/{i:02}.png (it is not a picture that Pillow" in errors
    last = errors.splitlines()[-1]
    assert "more than 1% of the 12 pictures" in last and "(a/08.png (it is not a picture" in last
    assert victim.read_bytes() == b"mine" and not picture.is_symlink()


def test_names_of_unreadable_pictures_are_printable(tmp_path, capsys):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    os.mkfifo(os.fsencode(tmp_path) + b"/b\xff\x1b[31m\nb.png")
    pictures = data.open_pictures(tmp_path, 9, train=True, labelled=False)
    data.BadPictures(pictures).add(data.read_batch(pictures, [(0, 1)]).unreadable)
    assert capsys.readouterr().err.endswith("b\\xff\\x1b[31m\\nb.png (it is no plain file)\n")


def test_all_ranks_unreadable_pictures_are_reported(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    bad = data.BadPictures(data.open_pictures(tmp_path, 9, train=True, labelled=False))
    assert bad.report([{3: "c.png"}, {}]) == "unreadable pictures: 1 (c.png)"


# ----------------------------------------------------------------------------------------------------------------------
# Numbers that are not finite


def _poison_step_two():
    """The weights that step 2 makes are not finite, and its loss, computed before, is."""

    def spoil(optimizer, *_):
        weight = optimizer.param_groups[0]["params"][0]
        if optimizer.state[weight]["step"] == 2:
            weight.data.view(-1)[0] = float("nan")

    register_optimizer_step_post_hook(spoil)


@pytest.mark.parametrize("what", ["loss", "weights"])
@pytest.mark.parametrize("name", ["train_tokenizer.py", "train_ar.py"])
def test_nothing_that_is_not_finite_is_saved(codes, tmp_path, name, what):
    flags = TOKENIZER if name == "train_tokenizer.py" else ["--codes", codes, *AR, "--warmup-epochs", 0]
    flags = [*flags, "--steps", 6, "--log-every", 4, "--out", tmp_path / "out"]
    if what == "loss":
        errors = fails_with_one_line(name, *flags, "--lr", "1e30")
    else:
        errors = fails_with_one_line(name, *flags, prepare=_poison_step_two)
    good = checkpoint.checkpoints(tmp_path / "out")
    assert [path.name for path in good] == ["step_00000001.pt"]
    assert f"non-finite at step 2; last good checkpoint: {good[0]}." in errors
    state = checkpoint.read_weights(good[0])
    weights = [state.get(key, {}) for key in ("model", "tokenizer", "tokenizer_ema", "discriminator")]
    tensors = [value for part in weights for value in part.values() if isinstance(value, torch.Tensor)]
    assert tensors and all(value.isfinite().all() for value in tensors)
