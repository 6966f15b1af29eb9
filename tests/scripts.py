"""Running the project's scripts as users do: in processes of their own, alone, as ranks, or under torchrun."""

import atexit
import functools
import importlib.util
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.run
import torch.multiprocessing

ROOT = Path(__file__).parent.parent


def command(script, *flags, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, str(ROOT / script), *map(str, flags)]


def environment():
    """No GPU. One thread: the same sums in the same order, and two processes do not fight over two cores."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


@functools.cache
def server():
    """Forks processes that have torch and the project imported: a script starts in a tenth of a second, not in
    several."""
    context = multiprocessing.get_context("forkserver")
    scripts = ["train_tokenizer", "train_ar", "encode", "sample", "eval_tokenizer"]
    context.set_forkserver_preload([*scripts, "torch.utils.tensorboard", "torch._dynamo"])
    before = dict(os.environ)
    os.environ.update(environment())
    context.Process(target=int).start()  # the server takes the environment of this moment
    os.environ.clear()
    os.environ.update(before)
    return context


def fork(folder, script, *flags, prepare=None, **variables):
    """Start a script as its command line would, in a forked process, whose output goes to files in `folder`. prepare: a
    function of a test module that it calls first. variables: further ones of its environment."""
    words = [str(ROOT / script), *map(str, flags)]
    child = server().Process(target=_script, args=(folder, os.getcwd(), environment() | variables, words, prepare))
    child.start()
    return child


def _script(folder, cwd, variables, words, prepare):
    for number, name in (1, "stdout"), (2, "stderr"):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    if prepare:
        prepare()
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def run(script, *flags, processes=1, code=0, prepare=None):
    """Run to the end, as one process or as ranks that are told what torchrun would tell them; checks the exit code;
    returns the completed process with its text (the ranks' texts one after the other)."""
    with tempfile.TemporaryDirectory() as folder:
        folders, children, launch = [Path(folder, str(rank)) for rank in range(processes)], [], {}
        for rank, own in enumerate(folders):
            own.mkdir()
            if processes > 1:
                launch = launch or {"MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
                launch |= {"WORLD_SIZE": str(processes), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            children.append(fork(own, script, *flags, prepare=prepare, **launch))
        for child in children:
            child.join(200)
        hanging = [child for child in children if child.is_alive()]
        for child in hanging:
            child.kill()
        out, errors = ("".join((own / name).read_text() for own in folders) for name in ("stdout", "stderr"))
    found = next((child.exitcode for child in children if child.exitcode), 0)
    assert not hanging and found == code, f"exit code {found}\n{out[-2000:]}\n{errors[-4000:]}"
    return subprocess.CompletedProcess([script, *flags], code, out, errors)


def free_port():
    with socket.create_server(("localhost", 0)) as free:
        return str(free.getsockname()[1])


def fails_with_one_line(script, *flags, **options):
    """Run what must end in exit code 2 and one line on stderr, which is returned."""
    line = run(script, *flags, code=2, **options).stderr.strip()
    assert "\n" not in line and "Traceback" not in line, line
    return line


def start(script, *flags, processes=1):
    """Start in the background, by the command line (torchrun's where there are several processes), in a process group
    of its own (so that a test can kill all of it)."""
    return subprocess.Popen(
        command(script, *flags, processes=processes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )


class Forked:
    """What `start` starts, quicker, by a fork (under torchrun of that alone: its ranks start as ever), with what tests
    want of a subprocess.Popen."""

    def __init__(self, script, *flags, processes=1, restarts=0):
        words = command(script, *flags, processes=processes)[1:]
        if processes > 1:
            words[:2] = [torch.distributed.run.__file__, f"--max-restarts={restarts}"]
        self.folder = tempfile.TemporaryDirectory()
        self.child = fork(self.folder.name, *words, prepare=os.setsid)
        self.pid = self.child.pid
        atexit.register(self.child.kill)  # of a test that failed: Python would wait for it

    def poll(self):
        return self.child.exitcode

    def communicate(self, timeout=120):
        self.child.join(timeout)
        self.returncode = self.child.exitcode
        assert self.returncode is not None, "it goes on"
        return [Path(self.folder.name, name).read_text() for name in ("stdout", "stderr")]


def on_two_ranks(worker, folder, *inputs):
    """Run worker(rank, *inputs), a function of a test module, in two processes that form a gloo group."""
    server()
    arguments = (worker, str(folder / "store"), *inputs)
    torch.multiprocessing.start_processes(_joined, arguments, nprocs=2, start_method="forkserver")


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


def names_in(folder):
    """The names in a run's folder; less TensorBoard's file, which has to be there where TensorBoard is."""
    names = sorted(path.name for path in folder.iterdir())
    boards = [name for name in names if name.startswith("events.out.tfevents.")]
    assert len(boards) == (importlib.util.find_spec("tensorboard") is not None)
    return [name for name in names if name not in boards]


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
