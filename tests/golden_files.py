"""What the golden tests share: the files, the rule that fills weights by name, the error measure."""

import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "golden"


def load(name):
    """The arrays of tests/golden/<name>.npz as tensors."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


def relative(ours, truth):
    """Norm of the difference over the norm of the truth, in float64."""
    ours, truth = ours.detach().double(), truth.double()
    return ((ours - truth).norm() / truth.norm()).item()


def named_tensor(name, shape, salt=0):
    """The golden weight of entry `name`: noise seeded by the name, scaled by fan-in, norms near one."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    noise = np.random.RandomState(zlib.crc32(name.encode()) ^ salt).standard_normal(shape).astype(np.float32)
    if len(shape) >= 2:
        noise /= np.sqrt(np.prod(shape[1:])).astype(np.float32)
        value = np.abs(noise) if ".lin" in name else noise  # LPIPS's heads are non-negative
    elif name.endswith("running_var"):
        value = 1 + 0.1 * np.abs(noise)
    else:
        value = 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
    return torch.from_numpy(np.asarray(value))


def fill(module, prefix="", keep=()):
    """Give every entry of a module its golden weight; entries ending in one of `keep` stay as they are."""
    state = module.state_dict()
    names = [name for name in state if not name.endswith(tuple(keep) or ("\0",))]
    with ThreadPoolExecutor() as pool:
        filled = pool.map(lambda name: named_tensor(prefix + name, tuple(state[name].shape)), names)
        module.load_state_dict(state | dict(zip(names, filled, strict=True)))
    return module


def checkpoint_keys(file):
    """{entry: (shape, dtype)} of a released file."""
    entries = {}
    for line in (FOLDER / "checkpoint_keys" / f"{file}.txt").read_text().splitlines():
        name, shape, kind = line.split("\t")
        entries[name] = (() if shape == "scalar" else tuple(map(int, shape.split("x"))), getattr(torch, kind))
    return entries
