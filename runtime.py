"""What every script shares: device and processes, precision and seeds, the run's folder, files, flags, the end.

    rt = runtime.start()            # first in main(): this process's device, and its rank among all
    runtime.run_script(main)        # last in the file: runs main(); what the user can put right ends in one line

So a script runs unchanged on a CPU, as `torchrun --nproc_per_node=8 X.py` on one host, and with `--nnodes` on many."""

import argparse
import contextlib
import ctypes
import datetime
import errno
import json
import os
import re
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

BACKENDS = {"cuda": "nccl", "npu": "hccl", "cpu": "gloo"}  # by torch.accelerator's name of the device
TIMEOUT = datetime.timedelta(minutes=30)  # of a collective: checkpoints and evaluations are waited for in one
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class UserError(ValueError):
    """Something the user can put right. Scripts print its one line and exit with code 2, no traceback."""


class Damaged(UserError):
    """A file is missing or not what it should be: it is lost, and whoever can go on without it may."""


class Runtime:
    """This process among all: `device`, `rank` of `world`, and `control`, a gloo group for messages between CPUs."""

    def __init__(self, device, rank=0, world=1, control=None):
        self.device, self.rank, self.world, self.control = device, rank, world, control
        self.main = rank == 0  # the one process that prints and writes files

    def say(self, text):
        """Print on the main process only."""
        if self.main:
            tqdm.write(printable(text), file=sys.stdout)

    def reduce(self, values, op="sum"):
        """Element-wise "sum" or "max" over all ranks: of a list of floats, in float64, or of a CPU tensor, in place."""
        if not torch.is_tensor(values):
            return self.reduce(torch.tensor(values, dtype=torch.float64), op).tolist()
        if self.world > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM, group=self.control)
        return values

    def gather(self, thing):
        """Every rank's `thing`, any small picklable object, as a list, on every rank."""
        things = [thing] * self.world
        if self.world > 1:
            dist.all_gather_object(things, thing, group=self.control)
        return things

    def share(self, thing):
        """The main process's `thing`, on every rank."""
        return self.gather(thing if self.main else None)[0]

    def place(self, network):
        """`network` on this device; on a GPU with the channels of its convolutions last in memory, which is faster."""
        for parameter in network.to(self.device).parameters():
            if self.device.type == "cuda" and parameter.dim() in (4, 5):
                layout = torch.channels_last if parameter.dim() == 4 else torch.channels_last_3d
                parameter.data = parameter.data.contiguous(memory_format=layout)
        return network

    def share_parameters(self, module):
        """Give every rank the main process's parameters: of equal seeds, other kinds of CPU draw other last bits."""
        if self.world > 1:
            for parameter in module.parameters():
                dist.broadcast(parameter.detach(), src=0)

    def barrier(self):
        self.gather(None)


def start():
    """Pick this process's device and, under torchrun, join the process group. Returns a `Runtime`."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # Otherwise a SIGKILL of torchrun leaves its ranks training, beside the run that is started next.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG of <linux/prctl.h>
    rank, world, local_rank = _launched()
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or device.type not in BACKENDS:
        device = torch.device("cpu")
    else:
        count = torch.accelerator.device_count()
        if local_rank >= count:
            raise UserError(f"{count} {device.type} device(s) here: launch torchrun with --nproc_per_node={count}")
        torch.accelerator.set_device_index(local_rank)
        device = torch.device(device.type, local_rank)
    if world == 1:
        return Runtime(device)
    options = {"store": _fresh_store(rank, world), "rank": rank, "world_size": world, "timeout": TIMEOUT}
    on_cpu = device.type == "cpu"
    dist.init_process_group(BACKENDS[device.type], device_id=None if on_cpu else device, **options)
    rt = Runtime(device, rank, world, dist.group.WORLD if on_cpu else dist.new_group(backend="gloo"))
    rt.barrier()  # a rank that ends at once, by a wrong flag say, would take the store from one that still joins
    return rt


def _launched():
    """(rank, world, local rank) from torchrun's environment; without it (0, 1, 0)."""
    found = {n: os.environ.get(n, "") for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    with contextlib.suppress(ValueError):
        rank, world, local_rank = int(found["RANK"] or 0), int(found["WORLD_SIZE"] or 1), int(found["LOCAL_RANK"] or 0)
        addressed = world == 1 or (found["MASTER_ADDR"] and found["MASTER_PORT"])
        if 0 <= rank < world and 0 <= local_rank < world and addressed:
            return rank, world, local_rank
    words = " ".join(f"{name}={value}" for name, value in found.items())
    raise UserError(f"the environment holds {words}: launch with torchrun, or unset them")


def _fresh_store(rank, world):
    """The store through which this launch's ranks find one another. torchrun's outlives restarts: in it they would find
    the addresses of ranks before them. So each rank leaves a new random name there and waits for an answer under it;
    rank 0 answers every name (of ranks that are gone, too) with a new random prefix, until all have confirmed it."""
    store, *_ = next(dist.rendezvous("env://", rank, world, timeout=TIMEOUT))
    name = prefix = os.urandom(16).hex()
    if rank > 0:
        store.set(f"name/{rank}", name)
        prefix = store.get(name).decode()  # waits
        store.set(f"{prefix}/{rank}", "has it")
    while rank == 0 and not store.check([f"{prefix}/{other}" for other in range(1, world)]):
        for other in range(1, world):
            store.set(store.get(f"name/{other}").decode(), prefix)  # get waits for the first such name
        time.sleep(0.02)
    return dist.PrefixStore(prefix, store)


def to_device(tensor, device):
    """A CPU tensor on `device`, copied without waiting for what the device still has to do."""
    return (tensor if device.type == "cpu" else tensor.pin_memory()).to(device, non_blocking=True)


def autocast(device, precision):
    """Context for forward passes: mixed precision for "bf16" and "fp16", nothing for "fp32"."""
    return torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision != "fp32")


def rounding_switches(device):
    """(object, attribute) that let float32 factors be rounded, to TF32 or HF32; convolutions' are on at first."""
    if device.type == "npu":
        return [(torch.npu.conv, "allow_hf32"), (torch.npu.matmul, "allow_hf32")]
    return [(torch.backends.cudnn, "allow_tf32"), (torch.backends.cuda.matmul, "allow_tf32")]


@contextlib.contextmanager
def exact_float32(device):
    """Context of true float32, also in a notebook, where torch's defaults hold: neither autocast nor rounded factors,
    which would change Inception's features by percents."""
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
    """The precision to use: `precision`, or bf16 on an accelerator and fp32 on a CPU where it is None. Whichever it is,
    float32 means float32 from now on: also the few products that autocast leaves in it."""
    precision = precision or ("fp32" if rt.device.type == "cpu" else "bf16")
    known = [name for name in PRECISIONS if name != "fp16" or rt.device.type != "cpu"]
    if precision not in known:
        raise UserError(f"unknown precision '{precision}'; on this device choose one of {', '.join(known)}")
    for switch in rounding_switches(rt.device):
        setattr(*switch, False)
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # "available but not enabled": as meant
    return precision


def seed_of(*numbers):
    """A seed of 63 bits, a function of any non-negative integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_everything(*numbers):
    """Seed torch's generators (all devices) from any non-negative integers, for instance (seed, step, micro-batch): so
    every draw of training is a function of its place in the run, and no random state is ever saved."""
    torch.manual_seed(seed_of(*numbers))


def open_run(rt, folder, settings):
    """Make the run's folder, print the resolved settings and save them as `config.json`. Returns the folder's path."""
    folder = Path(folder)
    if rt.main:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", settings)
        rt.say(f"device {rt.device.type} x {rt.world}, torch {torch.__version__}")
        for name, value in settings.items():
            rt.say(f"  {name:<18} {value}")
    rt.barrier()
    return folder


def split_batch(global_batch, micro_batch, world):
    """Micro-batches that each rank runs a step, so that world * micro_batch * accumulation = global_batch."""
    if global_batch % (micro_batch * world):
        parts = f"--micro-batch {micro_batch} times {world} process(es)"
        raise UserError(f"--global-batch {global_batch} is not a multiple of {parts}; change one of them")
    return global_batch // (micro_batch * world)


class StopSignal:
    """SIGTERM or SIGINT asks the loop (`asked`) to save and leave between two steps; a second SIGINT ends at once."""

    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a run does not depend on the terminal that watches it

    def _ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def replacing(path):
    """Context of a new binary file to write, which takes the place of `path` at the end: a reader sees the old file or
    the new one, never half. A failure leaves nothing and is a UserError; no link is written through."""
    scratch = Path(f"{path}.tmp")
    scratch.unlink(missing_ok=True)
    try:
        with open(scratch, "xb") as file:
            yield file
        os.replace(scratch, path)
    except BaseException as error:
        scratch.unlink(missing_ok=True)
        cause = error  # torch.save hides it behind a RuntimeError about its own half-written file
        while cause and not getattr(cause, "errno", None):
            cause = cause.__context__
        if cause:
            raise UserError(f"could not write {path}: {cause.strerror}; put that right and run again") from None
        raise


def write_json(path, content):
    """Write JSON by way of `replacing`; what JSON does not know is written as str() gives it."""
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1, default=str).encode() + b"\n")


@contextlib.contextmanager
def reading(path, what):
    """Context in which a user's file, which should be `what`, is read: any exception becomes a UserError of one line.
    It is `Damaged` unless the file may be good and cannot be read for now (permissions, a network's disk, memory)."""
    try:
        if not Path(path).is_file():
            raise Damaged(f"{path} is no plain file" if os.path.lexists(path) else f"there is no file {path}")
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (readers raise a dozen types)
        if getattr(error, "errno", None) or _out_of_memory(error):
            raise UserError(f"cannot read {path}: {reason_of(error)}") from None
        raise Damaged(f"{path} is not {what}, or it is damaged: {reason_of(error)}") from None


# --- The command line -------------------------------------------------------------------------------------------------
def parser(script):
    """An ArgumentParser whose errors are one line. script: its docstring, whose first two paragraphs, what it does and
    example commands, begin and end the help; the help of a flag ends in what presets give it, or else its default."""

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):  # argparse's name for what its own formatters override
            presets = arguments.presets.items()
            values = [f"{name}: {preset[action.dest]}" for name, preset in presets if action.dest in preset]
            if values:
                return f"{action.help} (preset {', '.join(values)})"
            if action.default is None or action.default is False:
                return action.help
            return super()._get_help_string(action)

    what, examples, *_ = script.split("\n\n")
    arguments = argparse.ArgumentParser(description=what, epilog=f"examples:\n{examples}", formatter_class=Help)
    arguments.error = lambda message: arguments.exit(2, f"{arguments.prog}: {message} (see --help)\n")
    arguments.presets = {}
    return arguments


def parse_with_presets(arguments, presets, argv=None):
    """Parse with `--preset` choosing a dict of defaults; a flag given overrides its preset entry."""
    arguments.presets = presets
    preset = arguments.parse_args(argv).preset
    if preset not in presets:
        arguments.error(f"unknown preset '{preset}'; choose one of {', '.join(presets)}")
    arguments.set_defaults(**presets[preset])
    return arguments.parse_args(argv)


def at_least(lowest, kind=int, highest=None, word=None):
    """An argparse type: `word`, or a number from `lowest` to `highest` (None: large, but nothing overflows)."""
    highest = highest if highest is not None else 10**10 if kind is int else 1e30

    def number(text):
        if text == word:
            return word
        value = kind(text)
        if not lowest <= value <= highest:
            limit = f"at most {highest}" if value > highest else f"at least {lowest}"
            raise argparse.ArgumentTypeError(f"must be {limit}, not {text}")
        return value

    number.__name__ = f"{kind.__name__} or '{word}'" if word else kind.__name__  # in argparse's message for no number
    return number


def new_file(path):
    """An argparse type: a file to write at the end, refused at the beginning where that cannot be."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise argparse.ArgumentTypeError(f"cannot write {path}: it is a folder or a device")
    if not os.access(Path(path).parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {path}: its folder does not exist or is read-only")
    return path


# --- The end of a script ----------------------------------------------------------------------------------------------
def run_script(main):
    """Run a script's main(), and leave. What the user can put right ends in one line and exit code 2, Ctrl-C in code
    130, all else in a traceback and code 1. Python's own exit is left out: it would wait for loader processes while
    other ranks wait for this one, and a thread of gloo that frees a tensor meanwhile aborts the process."""
    script, rank, code = Path(sys.argv[0]).name, os.environ.get("RANK", "0"), 0
    script += "" if rank == "0" else f" [rank {rank}]"
    warnings.formatwarning = lambda message, *_, **__: printable(f"{script}: warning: {message}\n")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # closed by whoever started us: a file of ours would take its number
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            setattr(sys, name, open(number, "w" if number else "r"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # whose encoding may lack a name's letters, and whose reader may be gone
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
        stream.write, stream.flush = _lossy()(stream.write), _lossy()(stream.flush)
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 (all of them)
        code, words = _ending(error)
        print(printable(f"{script}: {words}"), file=sys.stderr)
    os._exit(code)


def _ending(error):
    """(exit code, words) for the exception that ends a script."""
    spent = error  # out of memory, perhaps further up: while a CUDA graph is recorded, something else then fails, too
    while spent and not _out_of_memory(spent):
        spent = spent.__context__
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, UserError):
        words = str(error)
    elif isinstance(error, OSError) and error.filename:
        words = f"cannot read or write {error.filename}: {error.strerror}"
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        words = f"could not write a file: {error.strerror}; free some space and run again"
    elif spent:
        words = f"out of memory; give a smaller --batch or --micro-batch: {reason_of(spent)}"
    elif isinstance(error, RuntimeError) and re.search("Connection (closed|reset) by peer", str(error)):
        words = "another process has ended; its own message says why"
    elif "DataLoader worker" in str(error):
        words = f"a loader process has ended; give fewer --workers, 0 does without any: {reason_of(error)}"
    else:
        return 1, traceback.format_exc()
    return 2, words.replace("\n", "\\n")  # one line, whatever a name holds


@contextlib.contextmanager
def _lossy():
    """As a decorator: what cannot be written is lost without an error."""
    with contextlib.suppress(OSError):
        yield


def printable(text):
    """The text with its control characters (of a file's name, say) spelt out, but for line ends and tabs."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def reason_of(error):
    """What an exception says, in one line."""
    words = getattr(error, "strerror", None) or str(error)
    if not words or isinstance(error, KeyError):  # whose words are the key alone
        words = f"{type(error).__name__} {words}"
    return words.strip().splitlines()[0][:300]


def _out_of_memory(error):
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
