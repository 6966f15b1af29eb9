"""Kill training runs again and again, and see whether they end as a run that nothing touched. Not run by pytest.

    python tests/stress.py --kills 20 --seed 0        # a quarter of an hour on 2 CPU cores

Both training scripts run for as many steps as the kills need, alternately as one process and as two under torchrun.
Each is ended at a random moment: by SIGTERM; by SIGKILL of everything, as when a host goes down; or, under torchrun, by
SIGKILL of one rank. Then weights, averages, optimizers and the log are compared bit for bit with the run that was left
alone on one process. Exit code 1 where anything differs."""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from scripts import assert_equal, log_lines, run, start

from checkpoint import checkpoints, read_weights

# Two micro-batches a step, or one on each of two processes. 16 pictures are evaluated: full batches on either.
SHARED = "--global-batch 8 --micro-batch 4 --save-every 3 --log-every 1 --eval-every 5 --eval-pictures 16 --lr 1e-3"
TOKENIZER = "--data glyphs:60:AB --size 24 --channels 32 --multipliers 1 1 --blocks 1 --precision fp32 --workers 1"
TOKENIZER += " --gan-weight 0.1 --lecam-weight 0.05 --ema 0.9 " + SHARED
AR = "--width 32 --heads 2 --spatial-layers 2 --intra-layers 1 --dropout 0.1 " + SHARED


def make_codes(folder):
    """A code cache by an untrained tokenizer."""
    few = "--global-batch 4 --micro-batch 4 --steps 1 --workers 0 --eval-pictures 4 --data glyphs:60:ABC"
    run("train_tokenizer.py", *few.split(), "--out", folder / "tokenizer")
    flags = ["--tokenizer", folder / "tokenizer", "--data", "glyphs:60:ABC", "--size", 16, "--workers", 0]
    run("encode.py", *flags, "--out", folder / "codes")
    return folder / "codes"


def children(pid):
    """The processes that process `pid` has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:
            pass  # it has just ended
    return found


def kill(numbers, number=signal.SIGKILL):
    for pid in numbers:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def steps_logged(folder):
    return max((line["step"] for line in log_lines(folder)), default=0) if (folder / "log.jsonl").exists() else 0


def torture(script, flags, folder, kills, seed, processes=(1, 2), steps=None, start=start):
    """Run `script` whole and tortured; returns a dict of what happened: counts, and "equal" (True, or what differs)."""
    rng = random.Random(seed)
    flags = [*flags, "--steps", steps or 10 + 4 * kills]
    whole, out = folder / "whole", folder / "killed"
    run(script, *flags, "--out", whole)
    counts = {"SIGTERM": 0, "SIGKILL of all": 0, "SIGKILL of one rank": 0, "restarts": 0, "steps lost at most": 0}
    for round_ in range(10 * kills):
        if sum(list(counts.values())[:3]) == kills:
            break
        world = processes[round_ % len(processes)]
        before = steps_logged(out)
        process = start(script, *flags, "--out", out, processes=world)
        # At any moment: while it starts, or some steps further and then anywhere within a step or a save.
        deadline = time.monotonic() + (rng.uniform(0, 5) if rng.random() < 0.2 else 120)
        goal = before + rng.randint(1, 5)
        while process.poll() is None and time.monotonic() < deadline and steps_logged(out) < goal:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        if process.poll() is not None:
            break  # it came to its end
        how = rng.choice(list(counts)[: 2 if world == 1 else 3])
        ranks = children(process.pid) if world > 1 else []
        if how == "SIGTERM":
            kill([process.pid], signal.SIGTERM)
        elif how == "SIGKILL of one rank" and ranks:
            kill([rng.choice(ranks)])
        else:
            how = "SIGKILL of all"
            everyone = [process.pid, *ranks]
            everyone += [child for pid in everyone for child in children(pid)]
            kill(everyone)
        process.communicate(timeout=120)
        counts[how] += 1
        saved = checkpoints(out)
        reached = int(saved[-1].stem[5:]) if saved else 0
        counts["steps lost at most"] = max(counts["steps lost at most"], steps_logged(out) - reached)
        counts["restarts"] += 1
    run(script, *flags, "--out", out, processes=processes[-1])
    return counts | {"equal": compare(whole, out)}


def compare(whole, out):
    """True, or the first thing that differs. BatchNorm's running means, which belong to a process, are left out."""
    try:
        states = []
        for path in (checkpoints(whole)[-1], checkpoints(out)[-1]):
            state = read_weights(path)
            state["settings"].pop("out")
            for name in ("discriminator", "discriminator_ema"):
                entries = state.get(name, {})
                state[name] = {k: v for k, v in entries.items() if "running" not in k and "tracked" not in k}
            states.append(state)
        assert_equal(*states)
        assert_equal(log_lines(whole), log_lines(out), "log.jsonl")
        assert not list(out.glob("*.tmp")), "a .tmp is left"
    except AssertionError as error:
        return str(error) or "no"
    return True


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--kills", type=int, default=20, help="of each script")
    arguments.add_argument("--seed", type=int, default=0, help="of the moments and kinds")
    args = arguments.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="stress"))
    began = time.monotonic()
    results = {
        "train_tokenizer.py": torture("train_tokenizer.py", TOKENIZER.split(), folder / "I", args.kills, args.seed)
    }
    codes = make_codes(folder)
    flags = ["--codes", codes, "--val-codes", codes, *AR.split()]
    results["train_ar.py"] = torture("train_ar.py", flags, folder / "II", args.kills, args.seed)
    for name in results["train_ar.py"]:
        print(f"{name:<22}" + "".join(f"{result[name]!s:<22}" for result in results.values()))
    print(f"{time.monotonic() - began:.0f} s; " + ", ".join(results))
    shutil.rmtree(folder)
    sys.exit(any(result["equal"] is not True for result in results.values()))


if __name__ == "__main__":
    main()
