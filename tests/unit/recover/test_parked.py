"""Weights that wait in files: they are the same there and back, and memory is free meanwhile."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from torch import nn

from laconic.errors import RunError
from laconic.recover.parked import parked


class Tied(nn.Module):
    """Three layers, of which the first and the last share a weight, and a norm with buffers."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(size, size) for _ in range(3))
        self.norm = nn.BatchNorm1d(size)
        self.third.weight = self.first.weight


def test_what_is_away_is_the_same_there_and_back(tmp_path: Path) -> None:
    models = Tied(), Tied()
    before = [{n: t.clone() for n, t in each.state_dict().items()} for each in models]
    places = [{n: t.data_ptr() for n, t in each.state_dict().items()} for each in models]
    with parked(dict(zip(models, ({"", "first"}, {"second"}), strict=True)), tmp_path):
        stayed = [
            {n for n, t in each.state_dict().items() if t.data_ptr() == place[n]}
            for each, place in zip(models, places, strict=True)
        ]
        for model, values in zip(models, before, strict=True):
            assert all(torch.equal(t, values[n]) for n, t in model.state_dict().items())
            assert model.third.weight is model.first.weight
    assert stayed == [
        {"first.weight", "first.bias", "third.weight"},
        {"second.weight", "second.bias"},
    ]
    for path in tmp_path.iterdir():
        path.unlink()
    for model, values in zip(models, before, strict=True):
        assert all(torch.equal(t, values[n]) for n, t in model.state_dict().items())
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_memory_is_free_meanwhile(tmp_path: Path) -> None:
    def own() -> int:
        try:
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        except OSError:
            pytest.skip("this system does not tell the memory of a process")
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    model = Tied()
    rows, flags = 3000, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    size = 4 * rows**2
    pages = mmap.mmap(-1, size, flags=flags)  # malloc may keep what is freed; this goes back
    model.second.weight.data = torch.frombuffer(pages, dtype=torch.float32).view(rows, rows)
    model.second.weight.data.fill_(1.0)
    del pages
    before = own()
    with parked({model: {"first"}}, tmp_path):
        assert own() < before - 0.9 * size


def test_a_disk_that_does_not_take_them_is_named(tmp_path: Path) -> None:
    model = Tied()
    with pytest.raises(RunError, match=r"cannot be kept in .*missing.*make room"):
        parked({model: set()}, tmp_path / "missing").__enter__()
    assert model.first.weight.isfinite().all()
