"""Everything runs on the CPU, also beside a GPU, but for tests marked `gpu`."""

import os

# Threads that spin while they wait take minutes where something else runs too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu(number=1): runs on GPUs; skipped where there are fewer")


def pytest_runtest_setup(item):
    marker = item.get_closest_marker("gpu")
    wanted, there = (marker.args or (1,))[0] if marker else 0, torch.cuda.device_count()
    if there < wanted:
        pytest.skip(f"needs {wanted} GPU(s), and here are {there}")


@pytest.fixture(autouse=True)
def the_same_draws():
    """Whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_gpu(request, monkeypatch):
    """Code run in this process sees no accelerator; scripts.py sees to processes of their own."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
