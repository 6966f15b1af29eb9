"""What `python runtime.py` prints: the machine as scripts see it, what it lacks, whether processes add up.

python runtime.py                                    # this machine
torchrun --nproc_per_node=8 runtime.py               # also a second of all-reduces over all processes
"""

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._triton import has_triton

import runtime


def main():
    arguments = runtime.parser(
        "The machine as the scripts see it and what it lacks; under torchrun, whether all processes add up.",
        "  python runtime.py\n  torchrun --nproc_per_node=8 runtime.py",
    )
    arguments.add_argument(
        "--timeout",
        type=runtime.at_least(1, float),
        default=60,
        help="seconds that the processes are waited for",
    )
    args = arguments.parse_args()
    world, host, port = (os.environ.get(name) for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    hint = (
        f"Check that every host runs the same command, that {host}, port {port}, can be reached from all of "
        f"them, that NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name the interface between them, "
        f"and what the others print"
    )
    late = f"not all of the {world} processes answered within {args.timeout:g} s. {hint}"
    # A thread of its own, because a process that waits inside a collective listens to nothing else.
    watchdog = threading.Timer(args.timeout, runtime._fail, [late])
    watchdog.daemon = True
    watchdog.start()
    try:
        rt = runtime.start()
        if rt.main:
            report(rt)
        if rt.world > 1:
            check_processes(rt)
    except RuntimeError as error:  # what torch raises where processes cannot talk
        raise runtime.UserError(f"{str(error).strip().splitlines()[0]}. {hint}") from None
    watchdog.cancel()


def report(rt):
    """Print a line for each thing there is, and a note for each that is missing."""
    kind, notes = rt.device.type, []
    hub = Path(torch.hub.get_dir())
    hub_disk = next(folder for folder in (hub, *hub.parents) if folder.exists())
    driver = Path("/proc/driver/nvidia/version")
    driver = re.search(r"\d+\.[\d.]+|$", driver.read_text() if driver.exists() else "")[0]
    packages = [f"{name} {version(name)}" for name in ("torch", "numpy", "pillow", "triton", "torch_npu")]
    if kind == "cpu":
        devices = f"cpu, {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB of memory"
        compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
        notes.append("no accelerator: runs on the CPU")
        if driver:
            notes.append(
                "an NVIDIA driver is there, but this torch cannot use it: install a CUDA build of torch"
            )
        if Path("/dev/davinci_manager").exists() and version("torch_npu") == "no":
            notes.append("an NPU is there, but torch_npu is not installed")
    else:
        count, module = torch.accelerator.device_count(), torch.get_device_module(rt.device)
        each = [module.get_device_properties(number) for number in range(count)]
        devices = f"{count} x {kind}: "
        devices += ", ".join(f"{one.name} ({one.total_memory / 2**30:.1f} GiB)" for one in each)
        compiler = "triton" if has_triton() else None
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if here < count:
            notes.append(
                f"{here} process(es) for {count} devices: launch torchrun with --nproc_per_node={count}"
            )
    if not compiler:
        notes.append(f"torch.compile needs {'a C++ compiler' if kind == 'cpu' else 'triton'}")
    if version("tensorboard") == "no":
        notes.append("TensorBoard is not installed (optional)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = {
        "host": f"{socket.gethostname()}, {platform.platform()}",
        "versions": f"python {platform.python_version()}, {', '.join(packages)}",
        "CUDA": f"{torch.version.cuda or 'no'} (of torch), driver {driver or 'no'}",
        "devices": devices,
        "backend": runtime.BACKENDS[kind],
        "processes": f"{rt.world}; this is rank {rt.rank}, {rt.local_rank} on its host",
        "precisions": ", ".join(name for name in runtime.PRECISIONS if multiplies(rt, name)),
        "torch.compile": f"yes, with {compiler}" if compiler else "no",
        "cores": f"{cores}; torch uses {torch.get_num_threads()} in a process",
        "free disk": f"{runtime.free_gib('.'):.1f} GiB in {Path.cwd()}, "
        f"{runtime.free_gib(hub_disk):.1f} GiB in {hub}",
    }
    for name, value in [*lines.items(), *(("note", note) for note in notes)]:
        rt.say(f"{name:<14} {value}")


def version(package):
    """Its version, or "no" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "no"


def multiplies(rt, precision):
    """True where the scripts take that precision on this device and it multiplies right."""
    try:
        dtype = runtime.PRECISIONS[runtime.set_precision(rt, precision)]
        x = torch.ones(8, 8, device=rt.device, dtype=dtype)
        return (x @ x).sum().item() == 8**3
    except (runtime.UserError, RuntimeError):
        return False


def check_processes(rt):
    """Print where each rank is; all-reduce for about a second. Raises UserError where a sum is wrong."""

    def seconds(tensor, repeats):
        begin = time.perf_counter()
        for _ in range(repeats):
            dist.all_reduce(tensor)
        if rt.device.type != "cpu":
            torch.get_device_module(rt.device).synchronize()  # torch.accelerator's: not with every torch_npu
        return rt.reduce([(time.perf_counter() - begin) / repeats], "max")[0]

    # Whole numbers, exact in float32: entry i of rank r is i mod 1000 + r.
    entry = torch.arange(2**24, device=rt.device) % 1000
    tensor = (entry + rt.rank).float()
    first = seconds(tensor, 1)
    wrong = int((tensor != entry * rt.world + rt.world * (rt.world - 1) // 2).sum())
    places = [None] * rt.world
    dist.all_gather_object(places, (socket.gethostname(), wrong), group=rt.control)
    for host in sorted({host for host, _ in places}):
        ranks = [str(rank) for rank, place in enumerate(places) if place[0] == host]
        rt.say(f"{'ranks':<14} {', '.join(ranks)} on {host}")
    at_fault = [f"{rank} ({host})" for rank, (host, wrong) in enumerate(places) if wrong]
    if at_fault:
        raise runtime.UserError(
            f"the all-reduce gives a wrong sum on rank {', '.join(at_fault)}: a device, the network or a "
            f"driver is at fault; with NCCL, try NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1 to find out which"
        )
    tensor.zero_()  # or the sums would soon overflow
    long = seconds(tensor, max(1, min(100, int(0.5 / first))))
    short = seconds(tensor[:1], 100)
    speed = (
        2 * (rt.world - 1) / rt.world * tensor.nbytes / long / 1e9
    )  # what each process sends, and receives
    rt.say(f"{'all-reduce':<14} right; 64 MiB at {speed:.2f} GB/s a process, 4 bytes in {short * 1e6:.0f} us")
