"""The machine: what figures depend on besides the code."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["free_memory", "processor"]


def processor() -> str:
    """Return the name of the processor.

    >>> bool(processor())
    True
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def free_memory() -> int:
    """Return the bytes of memory that are free, as far as the system says.

    In a container whose memory is limited (control groups, version 2), what is left of that.

    >>> free_memory() > 0
    True
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kibibytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
    free, left = 1024 * int(kibibytes), _left_of_limit(Path("/sys/fs/cgroup"))
    return free if left is None else min(free, left)


def _left_of_limit(group: Path) -> int | None:
    """Return the bytes that a control group may still take; None: it has no limit."""
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        taken = int((group / "memory.current").read_text(encoding="ascii"))
        statistics = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    cached = sum(int(line.split()[1]) for line in statistics if line.startswith("inactive_file "))
    return None if limit == "max" else max(0, int(limit) - taken + cached)
