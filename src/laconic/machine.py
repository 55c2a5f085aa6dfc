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

    >>> free_memory() > 0
    True
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kibibytes = next(line.split()[1] for line in lines if line.startswith("MemAvailable"))
    return 1024 * int(kibibytes)
