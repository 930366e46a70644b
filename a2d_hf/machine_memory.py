"""How much memory there is, and how much this process has used at most.

Owns the two numbers that decide which gates run and that a manifest reports. Imports no torch.
"""

import os
import resource
import sys
from pathlib import Path


def available_memory() -> int:
    """Bytes that a process may still take: what the machine has left, or its container, whichever is less."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        pass
    if not found:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        if limit != "max":
            found.append(max(int(limit) - int(used), 0))
    except (OSError, ValueError):
        pass
    return min(found)


def peak_memory() -> int:
    """Most bytes that this process has held in memory at once, mapped files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
