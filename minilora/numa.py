"""Machines with several memory nodes: threads bound to a node's cores, memory spread over nodes or kept on one.

A core reads its own node's memory fastest, and one node's memory alone does not feed the cores of all. `interleave`
spreads weights, pages and adapters page by page over all nodes, so that all their bandwidths add up; `replicate` gives
each node a copy of the weights, which takes their bytes once for each, and spreads the rest. Linux only.
"""

import ctypes
import mmap
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .errors import ResourceError, UnsupportedError
from .memory import huge_pages

_SYSTEM = Path("/sys/devices/system/node")
# mbind(2): its number by machine, and the policies "on this node if there is room" and "page by page over all".
_MBIND = {"x86_64": 237, "aarch64": 235}
_PREFERRED, _INTERLEAVE = 1, 3


class Node(NamedTuple):
    """A memory node: its number, and the cores beside it that this process may use."""

    number: int
    cpus: frozenset[int]


def nodes() -> list[Node]:
    """The machine's nodes with cores for this process. Raises UnsupportedError where the system reports none."""
    if not hasattr(os, "sched_getaffinity") or not _SYSTEM.is_dir() or platform.machine() not in _MBIND:
        raise UnsupportedError("this system does not report NUMA nodes", "Use numa='off' (--numa off).")
    usable = os.sched_getaffinity(0)
    found = []
    for folder in sorted(_SYSTEM.glob("node[0-9]*"), key=lambda folder: int(folder.name[4:])):
        cpus = _numbers((folder / "cpulist").read_text()) & usable
        if cpus:
            found.append(Node(int(folder.name[4:]), frozenset(cpus)))
    return found


def _numbers(text: str) -> set[int]:
    """ "0-3,8" -> {0, 1, 2, 3, 8}."""
    ranges = (match.groups() for match in re.finditer(r"(\d+)(?:-(\d+))?", text))
    return {number for low, high in ranges for number in range(int(low), int(high or low) + 1)}


def assign(threads: int, found: Sequence[Node]) -> list[Node]:
    """Each thread's node: neighbouring threads on one node, in proportion to its cores."""
    cores = [node for node in found for _ in node.cpus]
    return [cores[thread * len(cores) // threads] for thread in range(threads)]


def spread(array: np.ndarray, found: Sequence[Node]) -> None:
    """Let an array that was never written lie page by page on all nodes. Raises ResourceError."""
    _set_policy(array, _INTERLEAVE, found)


def copy_to(array: np.ndarray, found: Sequence[Node]) -> np.ndarray:
    """A copy of a uint8 array on one node, or spread over several. Raises ResourceError."""
    try:
        # Whole pages of its own, so that the policy holds from the first byte to the last.
        copy = huge_pages(mmap.mmap(-1, max(1, len(array)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    except OSError:
        raise ResourceError(f"no memory for a copy of {len(array)} bytes", "Use --numa interleave or off.") from None
    _set_policy(copy, _INTERLEAVE if len(found) > 1 else _PREFERRED, found)
    copy[: len(array)] = array
    return copy[: len(array)]


def _set_policy(array: np.ndarray, policy: int, found: Sequence[Node]) -> None:
    """mbind(2) on the whole pages of an array."""
    first = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (array.ctypes.data + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end <= first:
        return
    mask = ctypes.c_ulong(sum(1 << number for number in {node.number for node in found}))
    call = ctypes.CDLL(None, use_errno=True).syscall
    arguments = (
        ctypes.c_void_p(first),
        ctypes.c_size_t(end - first),
        policy,
        ctypes.byref(mask),
        8 * ctypes.sizeof(mask),
    )
    if call(_MBIND[platform.machine()], *arguments, 0):
        reason = os.strerror(ctypes.get_errno())
        raise ResourceError(f"memory can't be placed on nodes: {reason}", "Use numa='off' (--numa off).")
