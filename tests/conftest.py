"""What every test finds: a seed, process-wide settings left as found, small networks, real data."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

pytest.register_assert_rewrite("helpers")  # their assertions say what was compared, too

# The same examples every time, and no deadline: other work may share the cores.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.load_profile("suite")

# A suite that a shell started in the background would ignore Ctrl-C, in its subprocesses too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

DATA = os.environ.get("LACONIC_DATA", "")

collect_ignore = ["helpers"]  # imported by tests, never collected


def process_settings() -> dict[str, Any]:
    """Return what one test could leave changed for the next."""
    return {
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


@pytest.fixture(autouse=True)
def guard() -> Iterator[None]:
    """Seed torch's global generator, put it back, and fail what leaves a setting changed."""
    before = process_settings()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    after = process_settings()
    torch.set_num_threads(int(before["threads"]))
    assert after == before, "the test left process-wide settings changed"


@pytest.fixture
def tiny_mlp() -> nn.Sequential:
    """Return a network of two linear layers: [batch, 6] -> [batch, 3]."""
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.fixture
def tiny_cnn() -> nn.Sequential:
    """Return a network with a BatchNorm: [batch, 1, 6, 6] -> [batch, 3]."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).eval()


@pytest.fixture
def inputs() -> Callable[..., Tensor]:
    """Return a function of a shape that draws the same normal numbers every time."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(1))

    return draw


@pytest.fixture(scope="session")
def laconic_data() -> Path:
    """Return the folder of real data that LACONIC_DATA names, or skip."""
    if not DATA:
        pytest.skip("LACONIC_DATA is not set: it names a folder with mnist/, cifar10/, glue/, ...")
    if not Path(DATA).is_dir():
        pytest.skip(f"LACONIC_DATA is {DATA!r}, which is no folder")
    return Path(DATA)
