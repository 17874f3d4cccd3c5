"""How much of the machine this process may use: the cores of its affinity, and what its control groups leave it.

Version 2 has one tree of groups, version 1 one for each controller. What limits a group limits those below it too, so
all from the process's own up to the root count. Inside a container the root often is the container's own group,
whatever path /proc tells: what is not found there limits nothing.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

TREES = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
# What version 1 gives for "none" is a page less than 2^63.
NO_LIMIT = 1 << 62


def usable_cores() -> int:
    """Cores that this process may really use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cores, *(max(1, quota // period) for quota, period in _quotas())])


def memory_left() -> int | None:
    """Bytes this process may still allocate under its control groups, counting page cache that would be reclaimed.

    None where they set no limit.
    """
    return min((max(0, limit - used + files) for limit, used, files in _memory()), default=None)


def _quotas() -> Iterator[tuple[int, int]]:
    """(quota, period) in microseconds, of CPU time and of wall time, for each group that limits it."""
    for group in _groups("cpu"):
        match _numbers(group / "cpu.max") or _numbers(group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us"):
            case [quota, period] if quota > 0 and period > 0:
                yield quota, period


def _memory() -> Iterator[tuple[int, int, int]]:
    """(limit, bytes used, page cache among them) for each group that limits them."""
    for group in _groups("memory"):
        for limit, used, below in (
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            if (numbers := _numbers(group / limit, group / used)) and numbers[0] < NO_LIMIT:
                words = _words(group / "memory.stat")
                kinds = zip(words[::2], words[1::2], strict=True)
                wanted = (f"{below}inactive_file", f"{below}active_file")
                yield numbers[0], numbers[1], sum(int(size) for kind, size in kinds if kind in wanted)


def _groups(controller: str) -> Iterator[Path]:
    """The groups of this process in which the controller may set limits, and all above them."""
    for line in _lines(OWN_GROUPS):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            roots = [TREES, TREES / "unified"]
        elif controller in controllers.split(","):
            roots = [TREES / name for name in {controllers, controller}]
        else:
            continue
        relative = PurePosixPath(path.lstrip("/"))
        for root in roots:
            yield from (root / part for part in (relative, *relative.parents) if ".." not in part.parts)


def _numbers(*files: Path) -> list[int]:
    """The numbers in these files; empty where one is missing or says that there is no limit."""
    words = [_words(file) for file in files]
    try:
        return [int(word) for some in words for word in some] if all(words) else []
    except ValueError:
        return []


def _words(file: Path) -> list[str]:
    return " ".join(_lines(file)).split()


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
