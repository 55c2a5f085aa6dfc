"""The one shape of a benchmark's result file, and the machine in words."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

FIELDS = [
    *("row", "task", "metric", "ours", "std", "seeds", "baseline", "published"),
    *("published_setting", "size_bytes", "ratio", "seconds", "note"),
]
FOLDER = Path(__file__).parent / "results"

# Asked before the benchmark itself is the load.
LOAD = os.getloadavg()[0]


def write(
    name: str, rows: Iterable[Mapping[str, Any]], *, packages: Sequence[str], threads: int = 1
) -> None:
    """Write benchmarks/results/NAME.json; a field that does not apply is null."""
    body = {
        "command": f"python benchmarks/{name}.py",
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "hardware": f"{hardware()}, threads: {threads}; load average {LOAD:.1f} before the run",
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "rows": [{field: row.get(field) for field in FIELDS} for row in rows],
    }
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def resident(field: str) -> int:
    """Return the bytes that this process holds (VmRSS), or held at its peak (VmHWM)."""
    # Not getrusage: what it says is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def hardware() -> str:
    """Return processor, cores and cache in words."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    facts = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    vectors = "AVX-512" if "avx512f" in facts.get("flags", "") else "no AVX-512"
    kind = facts.get("model name", platform.machine())
    return f"{kind}, {os.cpu_count()} cores, {facts.get('cache size', '?')} cache each, {vectors}"
