"""How much of the machine this process may use."""

import os
from pathlib import Path

CONTROL_GROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that this process may really use: its affinity, and its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _limits("cpu.max")
    return min(cores, max(1, quota[0] // quota[1])) if quota else cores


def memory_left() -> int | None:
    """Bytes that its control group still lets this process take, in place of files in memory where these must go; None
    where it sets no limit."""
    limit, used = _limits("memory.max"), _limits("memory.current")
    return max(0, limit[0] - used[0] + _file_bytes()) if limit and used else None


def _limits(name: str) -> list[int]:
    """The numbers in a file of the control group; empty where there is no limit."""
    try:
        return [int(word) for word in _words(name)]
    except ValueError:
        return []


def _file_bytes() -> int:
    """Bytes of the group's memory that only hold what is in files too."""
    words = _words("memory.stat")
    kinds = zip(words[::2], words[1::2], strict=True)
    return sum(int(size) for kind, size in kinds if kind in ("inactive_file", "active_file"))


def _words(name: str) -> list[str]:
    try:
        return (CONTROL_GROUP / name).read_text().split()
    except OSError:
        return []
