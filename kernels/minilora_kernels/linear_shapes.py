"""How large the tiles of products are, and how they prefetch."""

from . import cpu
from .simd_memory import prefetch_once, prefetch_soon

# Rows of the tile for many rows and weights of 4 or 8 bits, where the CPU runs it best, and how many such tiles
# together prefetch the next block. Registers hold all its sums, unlike those of 8 rows, but weights are read from the
# caches more often.
MANY, SHARERS = 5, 4
# From so many of the largest tiles on a block is worth unpacking.
UNPACKED_TILES = 3
# Bytes from what is read to what is prefetched.
AHEAD = 6144


def shapes() -> tuple[tuple[int, int], ...]:
    """Tile sizes, largest first: rows, and 1 for half a block at a time or 2 for a whole one.

    One group's integer sums stay in registers; the float32 sums of the largest tile are spilled between groups.
    """
    return ((8, 2), (4, 2), (2, 2), (1, 2)) if cpu.vectors() >= 32 else ((4, 1), (2, 2), (1, 2))


def prefetcher_of(rows: int):
    """How a tile prefetches: the largest ones compute as long as they read."""
    return prefetch_soon if rows in (MANY, shapes()[0][0]) else prefetch_once
