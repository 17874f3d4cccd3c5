"""This machine's ceilings, measured now: read bandwidth and int8 multiply-adds, on one thread and on all.

    python bench/ceilings.py

The best of 5 runs each. Last line: one JSON document.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass

import numpy as np

from minilora_kernels import cpu
from minilora_kernels.dot import SHORT_COLUMNS, begin_short, dot4_short, end_short, short_sums
from minilora_kernels.jit import kernel
from minilora_kernels.limits import usable_cores
from minilora_kernels.simd import i32x16, splat_i32, tile
from minilora_kernels.simd_lanes import hsum_i32
from minilora_kernels.simd_memory import compiler_barrier, load_i32, load_u8
from minilora_kernels.sync import share
from minilora_kernels.team import Team, team_program

# As many sums as fit in the registers beside the operands.
DOTS = 3 * cpu.vectors() // 4
LOOPS = 9_600_000 // DOTS
BYTES = 256 << 20

_sums, _dots = tile(i32x16, 16), tile(short_sums, DOTS)


@kernel
def _read(thread, threads, sync, job, fixed):
    """Add up all of data: the loads are what takes time."""
    data, out = job
    low, high = share(len(data) // 1024, thread, threads)
    sums = _sums()
    for i in range(16):
        sums[i] = splat_i32(np.int32(0))
    for block in range(low, high):
        for i in range(16):
            sums[i] = sums[i] + load_i32(data, block * 1024 + 64 * i)
    total = sums[0]
    for i in range(1, 16):
        total = total + sums[i]
    out[16 * thread] = hsum_i32(total)


@kernel
def _multiply(thread, threads, sync, job, fixed):
    """The dot product of nibbles, the fastest one, on registers only."""
    loops, data, out = job
    dots = _dots()
    for i in range(DOTS):
        dots[i] = begin_short(splat_i32(np.int32(0)))
    u, s = load_u8(data, 0), load_u8(data, 64)
    for _ in range(loops):
        for i in range(DOTS):
            if SHORT_COLUMNS:
                # Products and sums are two instructions here: the same product would be computed once for all.
                compiler_barrier()
                s = load_u8(data, 64)
            dots[i] = dot4_short(dots[i], u, s)
    total = splat_i32(np.int32(0))
    for i in range(DOTS):
        total = total + end_short(splat_i32(np.int32(0)), dots[i])
    out[16 * thread] = hsum_i32(total)


@dataclass(frozen=True)
class Ceilings:
    """read: GB/s; multiply: billions of int8 multiply-adds per second."""

    threads: int
    read: float
    multiply: float


def seconds(function, repeats: int = 5) -> float:
    """What the best of several runs takes."""
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


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = [measure(threads) for threads in sorted({1, usable_cores()})]
    for row in rows:
        print(f"threads {row.threads:3}: {row.read:8.1f} GB/s read, {row.multiply:8.0f} G int8 multiply-adds/s")
    print(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
