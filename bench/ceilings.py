"""This machine's ceilings, measured now: read bandwidth and the rate of byte multiply-adds, for one thread and for all.

python bench/ceilings.py
"""

import json
import time
from dataclasses import asdict, dataclass

import numpy as np

from minilora.runner import usable_cores
from minilora_kernels.dot import dot4
from minilora_kernels.jit import kernel
from minilora_kernels.simd import hsum_i32, i32x16, load_i32, load_u8, splat_i32, tile
from minilora_kernels.sync import share
from minilora_kernels.team import Team, team_program

DOTS = 24
LOOPS = 400_000
BYTES = 256 << 20

_sums = tile(i32x16, DOTS)


@kernel
def _read(rank, size, sync, job, fixed):
    """Add up all of data: nothing but loads."""
    data, out = job
    low, high = share(len(data) // 1024, rank, size)
    sums = _sums()
    for i in range(16):
        sums[i] = splat_i32(np.int32(0))
    for block in range(low, high):
        for i in range(16):
            sums[i] = sums[i] + load_i32(data, block * 1024 + 64 * i)
    total = sums[0]
    for i in range(1, 16):
        total = total + sums[i]
    out[16 * rank] = hsum_i32(total)


@kernel
def _multiply(rank, size, sync, job, fixed):
    """dot4 on registers only."""
    loops, data, out = job
    sums = _sums()
    for i in range(DOTS):
        sums[i] = splat_i32(np.int32(0))
    u, s = load_u8(data, 0), load_u8(data, 64)
    for _ in range(loops):
        for i in range(DOTS):
            sums[i] = dot4(sums[i], u, s)
    total = sums[0]
    for i in range(1, DOTS):
        total = total + sums[i]
    out[16 * rank] = hsum_i32(total)


@dataclass(frozen=True)
class Ceilings:
    """gigabytes read per second, billions of byte multiply-adds per second."""

    threads: int
    read: float
    multiply: float


def seconds(function, repeats: int = 5) -> float:
    """The best of several runs."""
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - started)
    return best


def measure(threads: int) -> Ceilings:
    """Both ceilings for a team of this size."""
    team, out = Team(threads), np.zeros(16 * threads, np.int32)
    data = np.ones(BYTES, np.uint8)
    read, multiply = team_program(_read), team_program(_multiply)
    team.run(read, (data, out))
    team.run(multiply, (1, data, out))
    found = Ceilings(
        threads,
        BYTES / seconds(lambda: team.run(read, (data, out))) / 1e9,
        threads * LOOPS * DOTS * 64 / seconds(lambda: team.run(multiply, (LOOPS, data, out))) / 1e9,
    )
    team.close()
    return found


if __name__ == "__main__":
    rows = [measure(threads) for threads in sorted({1, usable_cores()})]
    for row in rows:
        print(f"{row.threads} threads: read {row.read:.1f} GB/s, multiply-adds {row.multiply:.0f} G/s")
    print(json.dumps([asdict(row) for row in rows]))
