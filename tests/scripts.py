"""Running the project's scripts as users do: by subprocess, alone or under torchrun."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

ROOT = Path(__file__).parent.parent


def command(script, *flags, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, str(ROOT / script), *map(str, flags)]


def environment():
    # One thread: the same sums in the same order, and two processes do not fight over two cores.
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(script, *flags, processes=1, code=0):
    """Run to the end; checks the exit code; returns the completed process with its text."""
    done = subprocess.run(
        command(script, *flags, processes=processes),
        check=False,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
    assert done.returncode == code, (
        f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done


def fails_with_one_line(script, *flags):
    """Run what must end in exit code 2 and one line on stderr, which is returned."""
    line = run(script, *flags, code=2).stderr.strip()
    assert "\n" not in line and "Traceback" not in line, line
    return line


def start(script, *flags, processes=1):
    """Start in the background, in its own process group (so that a test can kill all of it)."""
    return subprocess.Popen(
        command(script, *flags, processes=processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )


def on_two_ranks(worker, folder, *inputs):
    """Run worker(rank, *inputs), a function of a test module, in two processes that form a gloo group."""
    store = folder / "store"
    torch.multiprocessing.spawn(_joined, (worker, str(store), *inputs), nprocs=2)


def _joined(rank, worker, store, *inputs):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    worker(rank, *inputs)
    dist.destroy_process_group()
    # As runtime.run_script leaves: a thread of gloo could abort the process while Python finalizes.
    os._exit(0)


def log_lines(folder, *without):
    """The JSON lines of a run's log, less what differs between equal runs (times, memory)."""
    without = {"images_per_second", "memory_gib", *without}
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in without} for line in lines]


def wait_for(path, process):
    """Until a file that the process should write is there."""
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


def assert_equal(a, b, path=""):
    """Bit for bit, through all containers."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b)):
            assert_equal(*pair, f"{path}.{i}")
    else:
        assert a == b, path
