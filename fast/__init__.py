"""The one door between the code that is read and what makes it fast on a GPU.

    @fast.path("norm.res_block")     # fast/norm.py: res_block, and res_block_takes, which says what it can take
    def res_block(block, x): ...     # the definition: plain PyTorch

Without a GPU or Triton the decorated function is the plain one itself. Otherwise calls that `..._takes` accepts go to
the kernels; FAST=0 in the environment keeps everything plain: no kernels, no compiled code, no CUDA graphs.
Nothing in fast/ is needed to understand the model, and nothing in it imports the rest of the project."""

import functools
import importlib.util
import os

import torch

ON = os.environ.get("FAST", "1") != "0"
AVAILABLE = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
PATHS = {}  # name -> (plain, kernel, takes): what the tests hold against each other


def path(name):
    """Decorates a plain function with the path `name`, "module.function": see the top of this file."""
    module, function = name.split(".")

    def door(plain):
        if not AVAILABLE:
            return plain
        kernels = importlib.import_module(f"fast.{module}")
        quick, takes = getattr(kernels, function), getattr(kernels, f"{function}_takes")
        PATHS[name] = plain, quick, takes

        @functools.wraps(plain)
        def choose(*args, **kwargs):
            if ON and takes(*args, **kwargs):
                return quick(*args, **kwargs)
            return plain(*args, **kwargs)

        return choose

    return door


def compiles(device, flag, steps):
    """Whether a training run compiles and captures graphs: as `flag` says (--compile or --no-compile); where it is
    None, on a GPU, for runs of 500 steps or more."""
    return ON and (AVAILABLE and device.type == "cuda" and steps >= 500 if flag is None else flag)


def compile(*modules):
    """Compile modules, each for itself, in place; state-dict entries keep their names."""
    import torch._functorch.config

    # The cache's keys leave out kernels of the backward pass: it would still use the old ones after an edit.
    torch._functorch.config.enable_autograd_cache = False
    for module in modules:
        module.compile(dynamic=False)


def forget(model):
    """Give back the memory that fast/decode.py keeps for a model that has drawn tokens."""
    if AVAILABLE:
        importlib.import_module("fast.decode").forget(model)
