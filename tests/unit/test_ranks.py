"""Processes that a caller has joined already."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from laconic import ranks
from laconic.errors import RunError


def test_processes_joined_by_what_the_host_cannot_use_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cuda:nccl")
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    with pytest.raises(RunError, match=r"by nccl alone.*'cpu:gloo,cuda:nccl'"), ranks.joined():
        pass
