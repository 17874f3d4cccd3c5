"""How much of the machine this process may use."""

import os
from pathlib import Path

CONTROL_GROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that this process may really use: its affinity, and its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = group_limits("cpu.max")
    return min(cores, max(1, quota[0] // quota[1])) if quota else cores


def group_limits(name: str) -> list[int]:
    """The numbers in a file of the control group; empty where there is no limit."""
    try:
        return [int(word) for word in (CONTROL_GROUP / name).read_text().split()]
    except (OSError, ValueError):
        return []
