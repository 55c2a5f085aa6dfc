"""The command that documents start several processes with, as it is, agent included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers.cli import finished_run

PATIENCE = 300  # seconds for what takes ten: other work may share the cores
NETWORK = """\
from torch import nn


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(64, 64) for _ in range(2)])
        self.head = nn.Linear(64, 10)

    def forward(self, images):
        hidden = images.flatten(1)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)
"""
STEPS = """\
model: chain:Chain
task: {npz: digits.npz}
steps:
  - quantize: {weight: ternary}
  - reconstruct: {parts: 2, order: parallel, solve: {gradient: {updates: 4, batch: 20}}}
"""


def test_torchrun_starts_a_run(tmp_path: Path) -> None:
    recipe, out = finished_run(tmp_path) / "two.yaml", tmp_path / "two"
    recipe.write_text(STEPS, encoding="utf-8")
    (tmp_path / "chain.py").write_text(NETWORK, encoding="utf-8")
    agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*agent, "-m", "laconic", "--json", "compress", str(recipe), "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    results = [line for line in done.stdout.splitlines() if json.loads(line)["event"] == "result"]
    assert len(results) == 1, "one of the processes speaks"
    made = json.loads((out / "history.json").read_text(encoding="utf-8"))[-1]
    assert made["step"] == "reconstruct"
    assert [len(curve) for curve in made["curves"].values()] == [4, 4], "the other's too"
