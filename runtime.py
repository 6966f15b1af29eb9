"""Where a script runs: device, process group, precision, stop signals, settings, the run log.

Every script of this project starts with `runtime.start()` and so runs unchanged as `python X.py` on a CPU, as `torchrun
--nproc_per_node=8 X.py` on one host, and with `--nnodes` on many. Nothing here knows a model."""

import argparse
import contextlib
import ctypes
import datetime
import errno
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

# torch.accelerator names the device; this is all that differs between vendors. Ascend: torch_npu registers itself with
# torch when torch is imported.
BACKENDS = {"cuda": "nccl", "npu": "hccl", "cpu": "gloo"}
TIMEOUT = datetime.timedelta(minutes=30)  # of a collective: checkpoints and evaluations are waited for in one
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class UserError(ValueError):
    """Something the user can put right. Scripts print its one line and exit with code 2, no traceback."""


class Unreadable(UserError):
    """A file that is there and cannot be read for now. Whoever went on without it would write over it."""


# ----------------------------------------------------------------------------------------------------------------------
# Device and processes


@dataclass
class Runtime:
    """This process among all: `device`, `rank` of `world`, `local_rank` on its host, and a gloo group for small
    messages between hosts' CPUs (they never make an accelerator wait)."""

    device: torch.device
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    control: object = None

    @property
    def main(self):
        """True on the one process that prints and writes files."""
        return self.rank == 0

    @property
    def layout(self):
        """Memory format of networks of convolutions: channels last on a GPU, which wants that."""
        return torch.channels_last if self.device.type == "cuda" else torch.preserve_format

    def say(self, *words):
        """Print on the main process only."""
        if self.main:
            tqdm.write(printable(" ".join(str(w) for w in words)), file=sys.stdout)
            sys.stdout.flush()

    def reduce(self, values, op="sum"):
        """Element-wise `op` ("sum", "max" or "mean") of a list of floats over all ranks, in float64."""
        values = torch.as_tensor(values, dtype=torch.float64, device="cpu").clone()
        if self.world > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, group=self.control)
        return (values / self.world if op == "mean" else values).tolist()

    def union(self, flags):
        """Element-wise `or` of a uint8 tensor of zeros and ones over all ranks."""
        flags = flags.cpu()
        if self.world > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.control)
        return flags

    def share(self, thing):
        """The main process's `thing` (any small picklable object), on every rank."""
        if self.world == 1:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def share_parameters(self, module):
        """Give every rank the main process's parameters. Equal seeds draw equal ones, but for their last bits on
        another kind of CPU."""
        if self.world > 1:
            for parameter in module.parameters():
                dist.broadcast(parameter.detach(), src=0)

    def gather(self, thing):
        """Every rank's `thing` (any small picklable object), as a list, on every rank."""
        things = [thing] * self.world
        if self.world > 1:
            dist.all_gather_object(things, thing, group=self.control)
        return things

    def barrier(self):
        if self.world > 1:
            dist.barrier(group=self.control)

    def memory(self):
        """Peak accelerator memory of this process so far, in GiB; 0 on a CPU."""
        if self.device.type == "cpu":
            return 0.0
        return torch.get_device_module(self.device).max_memory_allocated() / 2**30


def start():
    """Pick this process's device and, under torchrun, join the process group. Returns a `Runtime`."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # Where torchrun is killed by SIGKILL, its ranks would train on, beside the run that is started next.
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    world = _launched("WORLD_SIZE", 1, 1)
    rank, local_rank = _launched("RANK", 0, 0, world - 1), _launched("LOCAL_RANK", 0, 0, world - 1)
    if world > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        raise UserError(f"WORLD_SIZE is {world} without MASTER_ADDR and MASTER_PORT; launch with torchrun, or unset it")
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        count, kind = torch.accelerator.device_count(), torch.accelerator.current_accelerator().type
        if kind in BACKENDS:
            if local_rank >= count:
                raise UserError(
                    f"process {local_rank} of this host has no {kind} device: there are {count}; "
                    f"launch torchrun with --nproc_per_node={count}"
                )
            device = torch.device(kind, local_rank)
            torch.accelerator.set_device_index(local_rank)
    control = None
    if world > 1:
        backend = BACKENDS[device.type]
        dist.init_process_group(
            backend,
            store=_fresh_store(rank, world),
            rank=rank,
            world_size=world,
            timeout=TIMEOUT,
            device_id=None if device.type == "cpu" else device,
        )
        control = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo")
    return Runtime(device, rank, world, local_rank, control)


def _launched(name, default, lowest, highest=10**6):
    """A number that torchrun puts into the environment."""
    text = os.environ.get(name, str(default))
    try:
        return at_least(lowest, highest=highest)(text)
    except (ValueError, argparse.ArgumentTypeError):
        found = f"{name}={text}, with WORLD_SIZE={os.environ.get('WORLD_SIZE', 'unset')}"
        raise UserError(f"the environment holds {found}: launch with torchrun, or unset it") from None


def _fresh_store(rank, world):
    """The store through which this launch's ranks find one another.

    torchrun keeps one store over all its restarts, and restarted ranks would find in it the addresses of those before
    them, and fail or wait for them. So rank 0 offers a prefix that was never used, the others answer with a name of
    their own, and an offer whose list of answers lacks that name is an old one."""
    store = next(dist.rendezvous("env://", rank, world, timeout=TIMEOUT))[0]
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("offer", mine)
        names = [store.get(f"{mine}/{other}").decode() for other in range(1, world)]  # waits for each
        store.set(f"{mine}/names", " ".join(names))
        return dist.PrefixStore(mine, store)
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        offer = store.get("offer").decode()
        store.set(f"{offer}/{rank}", mine)
        while store.get("offer").decode() == offer and time.monotonic() < deadline:
            if store.check([f"{offer}/names"]) and mine in store.get(f"{offer}/names").decode():
                return dist.PrefixStore(offer, store)
            time.sleep(0.02)
    raise UserError(f"rank {rank} found no others within {TIMEOUT}; see to the other processes and run again")


def to_device(tensor, device):
    """A CPU tensor on `device`, copied without waiting for what the device still has to do."""
    if device.type != "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def autocast(device, precision):
    """Context for forward passes: mixed precision for "bf16" and "fp16", nothing for "fp32"."""
    return torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32")


def rounding_switches(device):
    """(object, attribute) that let float32 products and convolutions round their factors: to TF32 on a GPU, to HF32 on
    an NPU. For convolutions both are on by default."""
    if device.type == "npu":
        return [(torch.npu.conv, "allow_hf32"), (torch.npu.matmul, "allow_hf32")]
    return [(torch.backends.cudnn, "allow_tf32"), (torch.backends.cuda.matmul, "allow_tf32")]


@contextlib.contextmanager
def exact_float32(device):
    """float32 that means it, also in a notebook, where torch's defaults hold: neither autocast nor rounded factors,
    which would move Inception's features by percents."""
    before = [(*switch, getattr(*switch)) for switch in rounding_switches(device)]
    for switch in rounding_switches(device):
        setattr(*switch, False)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch in before:
            setattr(*switch)


def set_precision(rt, precision):
    """The precision to use: `precision`, or bf16 on an accelerator and fp32 on a CPU where it is None.

    Whichever it is, float32 means float32 in this process from now on. That costs bf16 and fp16 nothing: autocast
    computes their products in half precision, and those few that it leaves in float32 are not to be rounded."""
    precision = precision or ("fp32" if rt.device.type == "cpu" else "bf16")
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision '{precision}'; choose one of {', '.join(PRECISIONS)}")
    if precision == "fp16" and rt.device.type == "cpu":
        raise UserError("fp16 needs an accelerator; on a CPU use --precision fp32 or bf16")
    for switch in rounding_switches(rt.device):
        setattr(*switch, False)
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # "available but not enabled": as meant
    return precision


def seed_of(*numbers):
    """A seed of 63 bits, a function of any non-negative integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(*numbers):
    """Seed torch's generators (all devices) from any non-negative integers, for instance (seed, step, micro-batch).
    This is why no random state is ever saved: every draw of training is a function of its place in the run."""
    torch.manual_seed(seed_of(*numbers))


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def parser(description, examples):
    """An ArgumentParser whose help shows defaults and ends with `examples`, and whose errors are one line."""

    class OneLine(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"{self.prog}: {message} (see --help)\n")

    class Format(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):  # no "(default: None)" behind flags that have no default
            hidden = action.default is None or action.default is False
            return action.help if hidden else super()._get_help_string(action)

    return OneLine(description=description, epilog=f"examples:\n{examples}", formatter_class=Format)


def at_least(lowest, kind=int, highest=None):
    """An argparse type: a number from `lowest` to `highest` (without one: what no computation overflows with)."""
    highest = highest if highest is not None else 10**10 if kind is int else 1e30

    def number(text):
        value = kind(text)
        if not lowest <= value <= highest:
            limit = f"at most {highest}" if value > highest else f"at least {lowest}"
            raise argparse.ArgumentTypeError(f"must be {limit}, not {text}")
        return value

    number.__name__ = kind.__name__  # argparse names it where the text is no number
    return number


def add_length_flags(add):
    """The flags of both trainings for pictures a step and the run's length; `add` is a group's add_argument."""
    add("--global-batch", type=at_least(1), help="pictures a step, over all devices")
    add("--micro-batch", type=at_least(1), help="pictures a device at once; accumulation is derived")
    add("--epochs", type=at_least(0), help="length of the run, epochs of ceil(pictures / global batch) steps")
    add("--steps", type=at_least(0), help="length of the run in steps instead, where not 0")


def add_output_flags(arguments, out, log_every, evaluated, eval_pictures):
    """The flags of both trainings for the run's folder and what goes there when."""
    add = arguments.add_argument_group("output").add_argument
    kept = "keep checkpoints of multiples of this many steps for good; 0: none"
    add("--out", default=out, help="the run's folder")
    add("--log-every", type=at_least(1), default=log_every, help="steps between log lines")
    add("--save-every", type=at_least(1), default=1000, help="steps between checkpoints")
    add("--keep-every", type=at_least(0), default=0, help=kept)
    add("--eval-every", type=at_least(1), default=1000, help=f"steps between {evaluated}")
    pictures = "validation pictures an evaluation takes"
    add("--eval-pictures", type=at_least(1), default=eval_pictures, help=pictures)
    add("--allow-changes", action="store_true", help="resume although settings differ from the checkpoint's")


def parse_with_presets(arguments, presets, argv=None):
    """Parse with `--preset` choosing a dict of defaults; a flag given overrides its preset entry.

    The help of each flag that a preset sets is completed with the presets' values.
    """
    for action in arguments._actions:
        values = {name: preset[action.dest] for name, preset in presets.items() if action.dest in preset}
        if values:
            action.help += " (preset " + ", ".join(f"{name}: {value}" for name, value in values.items()) + ")"
    given = arguments.parse_args(argv)
    if given.preset not in presets:
        arguments.error(f"unknown preset '{given.preset}'; choose one of {', '.join(presets)}")
    for name, value in presets[given.preset].items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    return given


def run_script(main):
    """Run a script's main(); a UserError, a full disk or a file that cannot be read or written ends in one line and
    exit code 2, no traceback.

    Whatever ends it, the process leaves at once: others may wait inside a collective for this one (torchrun then ends
    them), and Python would wait at its exit for loader processes, which leave signals to this process.
    """
    name = Path(sys.argv[0]).name
    warnings.formatwarning = lambda message, *_, **__: printable(f"{name}: warning: {message}") + "\n"
    for descriptor, stream in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        if getattr(sys, stream) is None:  # closed: before a file of ours takes that number
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
            setattr(sys, stream, open(descriptor, "w" if descriptor else "r"))  # noqa: SIM115
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        main()
    except UserError as error:
        _fail(error)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            name = error.filename or "a file"
            _fail(f"the disk is full: could not write {name}; free some space and run again")
        if error.filename:
            _fail(f"cannot read or write {error.filename}: {error.strerror}")
        _fail(traceback.format_exc(), code=1)
    except KeyboardInterrupt:
        _fail("interrupted", code=130)
    except Exception as error:  # noqa: BLE001 (every other one, with its traceback)
        cause = error  # while a CUDA graph is recorded, memory running out ends in another error
        while cause is not None and not out_of_memory(cause):
            cause = cause.__context__
        if cause is not None:
            flag = "--micro-batch" if name.startswith("train_") else "--batch"
            advice = "" if name == "bench.py" else f", give a smaller {flag}"
            _fail(f"out of memory on the device{advice}: {reason_of(cause)}")
        if "DataLoader worker" in str(error):
            _fail(f"a loader process has ended ({reason_of(error)}); give fewer --workers, 0 does without any")
        _fail(traceback.format_exc(), code=1)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by way of Python's own exit: a thread of gloo that lets go of a tensor meanwhile would abort the process.
    os._exit(0)


def _fail(message, code=2):
    rank = os.environ.get("RANK", "0")
    where = f" [rank {rank}]" if rank != "0" else ""
    message = str(message) if code == 1 else str(message).replace("\n", "\\n")  # one line, whatever a name holds
    print(printable(f"{Path(sys.argv[0]).name}{where}: {message}"), file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


class Output:
    """stdout or stderr that nobody need be reading: what cannot be written is lost, and nothing else is."""

    def __init__(self, stream):
        self.stream = stream
        stream.reconfigure(errors="backslashreplace")  # names may hold what the terminal's encoding lacks

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def printable(text):
    """A text whose control characters, escape sequences of a file's name say, are spelt out; lines stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def out_of_memory(error):
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def reason_of(error):
    """What an exception says, in one line."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return words.strip().splitlines()[0][:300]


def split_batch(global_batch, micro_batch, world):
    """Micro-batches that each rank runs a step, so that world * micro_batch * accumulation = global_batch."""
    if micro_batch < 1 or global_batch % (micro_batch * world):
        raise UserError(
            f"--global-batch {global_batch} is not a multiple of --micro-batch {micro_batch} times {world} "
            f"process(es); change one of them"
        )
    return global_batch // (micro_batch * world)


def run_length(args, pictures):
    """(steps an epoch, steps of the run), from the flags of `add_length_flags`."""
    epoch_steps = math.ceil(pictures / args.global_batch)
    total = args.steps or args.epochs * epoch_steps
    if total == 0:
        raise UserError("--steps and --epochs are both 0: nothing to do")
    return epoch_steps, total


# ----------------------------------------------------------------------------------------------------------------------
# Stopping, logging


class StopSignal:
    """SIGTERM or SIGINT asks the loop to save and leave between two steps; a second SIGINT ends at once."""

    def __init__(self, rt):
        self.rt, self.asked = rt, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a run does not depend on the terminal that watches it

    def _ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self):
        """True on all ranks as soon as one of them was asked: they must leave at the same step."""
        return bool(self.rt.reduce([self.asked], "max")[0])


class FiniteGuard:
    """Remembers, on the device and without waiting for it, the first step whose loss or weights were not finite."""

    def __init__(self, device):
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)

    def watch(self, step, *tensors):
        """Look at a step's loss; or, before saving, at all that will be saved."""
        for tensor in tensors:
            # Of a sharded tensor this rank's part; `check` asks all ranks.
            tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            bad = ~torch.isfinite(tensor.detach()).all() & (self.first_bad < 0)
            self.first_bad.masked_fill_(bad, step)

    def check(self, rt, checkpoint):
        """Call at log intervals and before saving. Raises UserError naming the step and the last good file."""
        first = int(rt.reduce([float(self.first_bad)], "max")[0])
        if first >= 0:
            raise UserError(
                f"loss or weights became non-finite at step {first}; last good checkpoint: {checkpoint or 'none yet'}. "
                f"Lower --lr or use --precision bf16 or fp32, then run again to go on from there"
            )


class RunLog:
    """A line an interval on the screen, the same as JSON in `log.jsonl`, and TensorBoard where it is installed.

    The values are those of the step named, averaged over its global batch. After a resume, lines past the resumed step
    are dropped, so that the file reads like one uninterrupted run.
    """

    def __init__(self, rt, folder, total, first_step, images_a_step):
        self.rt, self.total, self.images_a_step = rt, total, images_a_step
        self.last_time, self.last_step = time.perf_counter(), first_step
        self.board, self.bar, self.noted = None, None, set()  # noted: steps with a note on file
        if not rt.main:
            return
        self.path = Path(folder) / "log.jsonl"
        kept = [line for line in _lines(self.path) if line["step"] <= first_step]
        self.noted = {line["step"] for line in kept if "images_per_second" not in line}
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder), purge_step=first_step + 1)
        except ImportError:
            pass  # optional
        self.bar = tqdm(total=total, initial=first_step, disable=not sys.stderr.isatty(), dynamic_ncols=True)

    def tick(self):
        if self.bar is not None:
            self.bar.update()

    def line(self, step, **values):
        """Write one line for `step` (1-based count of steps done); call it on every rank."""
        now = time.perf_counter()
        speed = (step - self.last_step) * self.images_a_step / max(now - self.last_time, 1e-9)
        left = (self.total - step) * self.images_a_step / max(speed, 1e-9)
        self.last_time, self.last_step = now, step
        memory = self.rt.reduce([self.rt.memory()], "max")[0]
        if self.rt.main:
            self.write(step, **values, images_per_second=speed, memory_gib=memory)
            words = " ".join(f"{name} {value:.4g}" for name, value in values.items())
            clock = datetime.timedelta(seconds=round(left))
            self.rt.say(f"step {step}/{self.total} {words} | {speed:.1f} images/s {memory:.1f} GiB left {clock}")

    def note(self, step, **values):
        """Print and record what was measured beside the losses; its time does not count as training time."""
        self.rt.say(f"step {step} " + " ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self.write(step, **values)
        self.last_time, self.last_step = time.perf_counter(), step

    def has_note(self, step):
        """Whether a run that this one goes on from has noted that step; the same on every rank."""
        return self.rt.share(step in self.noted)

    def write(self, step, **values):
        """Append a JSON line, and TensorBoard scalars."""
        if not self.rt.main:
            return
        values = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if self.board and not isinstance(value, str):
                self.board.add_scalar(name, value, step)

    def close(self):
        if self.bar is not None:
            self.bar.close()
        if self.board:
            self.board.close()


def _lines(path):
    """The lines of a log that are whole (a killed run may have cut the last one)."""
    lines = []
    if path.exists():
        with reading(path, "a log"):
            for text in path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]


def open_run(rt, folder, settings):
    """Make the run's folder, print the resolved settings and save them as `config.json`."""
    folder = Path(folder)
    if rt.main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None
        write_json(folder / "config.json", settings)
        rt.say(f"device {rt.device.type} x {rt.world}, torch {torch.__version__}")
        for name, value in settings.items():
            rt.say(f"  {name:<18} {value}")
    rt.barrier()
    return folder


def write_json(path, content):
    """Write JSON as `write_text` does; what JSON does not know is written as str() has it."""
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")


def write_text(path, text):
    """Write a text as `replacing` does."""
    with replacing(path) as file:
        file.write(text.encode(errors="surrogateescape"))


@contextlib.contextmanager
def replacing(path):
    """A new binary file, to be written, that takes the place of `path` at the end: a reader sees the old file or the
    new one, never half. Nothing is left of a failure, and nothing is written through a link."""
    scratch = Path(f"{path}.tmp")
    scratch.unlink(missing_ok=True)
    try:
        with open(scratch, "xb") as file:
            yield file
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def reading(path, what):
    """Around the reading of a user's file: whatever is raised becomes a UserError of one line with the path and the
    reason. It is an `Unreadable` where the file may be good and cannot be read for now (permissions, a network file
    system, memory); any other says that the file is absent, or is not `what` it should be."""
    try:
        if not Path(path).is_file():
            raise UserError(f"{path} is no plain file" if os.path.lexists(path) else f"there is no file {path}")
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (readers raise a dozen types)
        if getattr(error, "errno", None) or out_of_memory(error):
            raise Unreadable(f"cannot read {path}: {reason_of(error)}") from None
        raise UserError(f"{path} is not {what}, or it is damaged: {reason_of(error)}") from None


def free_gib(folder):
    """Free disk space at `folder`, in GiB."""
    return shutil.disk_usage(folder).free / 2**30
