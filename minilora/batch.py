"""The rows of one step: Sequence is the state of a text, pack() makes the flat arrays that the step reads."""

from itertools import accumulate
from typing import NamedTuple

import numpy as np

from minilora_kernels.attention import SPLIT, partial_size

# Columns of tiles: a tile is a few consecutive tokens of one sequence.
TILE_ROW, TILE_TOKENS, TILE_POSITION, TILE_PAGES = range(4)
# Columns of long: a token whose positions are shared out in splits of 256, with room for all of them in `parts` from
# LONG_PARTS on.
LONG_ROW, LONG_POSITION, LONG_PAGES, LONG_SPLITS, LONG_PARTS = range(5)

ROWS_PER_TILE = 32


class StepInput(NamedTuple):
    """What one step computes, int64 but for scales. T rows, rows of a sequence together.

    tokens, positions, pages_at: [T]; pages_at: where in `pages` the row's sequence starts. tiles: [n, 4] and
    long: [n, 5], what attention has to do, each row in one of them. segments: [S, 4], first row, end row, slot and
    first column in the shrunk rows of each run of rows with one adapter; scales: float32 [S]. out_rows: rows whose logits are wanted; out_segments,
    out_scales: like segments, counted in out_rows.
    """

    tokens: np.ndarray
    positions: np.ndarray
    pages_at: np.ndarray
    pages: np.ndarray
    tiles: np.ndarray
    long: np.ndarray
    segments: np.ndarray
    scales: np.ndarray
    out_rows: np.ndarray
    out_segments: np.ndarray
    out_scales: np.ndarray


class Use(NamedTuple):
    """An adapter that a sequence uses: its slot in the pool, and the factor on it."""

    slot: int
    scale: float


class Chunk(NamedTuple):
    """Tokens start .. start + length of a sequence, computed in one step.

    pages: the sequence's page numbers; uses: its adapters in order; first_logits: from which of its positions on
    logits are wanted (start + length for none).
    """

    tokens: list[int]
    start: int
    length: int
    pages: list[int]
    uses: tuple[Use, ...]
    first_logits: int


def tokens_per_tile(group: int) -> int:
    """How many tokens of a prompt one attention tile takes: a power of two, about 32 rows."""
    count = 1
    while 2 * count * group <= ROWS_PER_TILE:
        count *= 2
    return count


def split_size(heads: int, head_dim: int) -> int:
    """float32 numbers of one split's unmerged results over all heads of a row."""
    return heads * partial_size(head_dim)


class Packer:
    """Makes StepInputs. group: query heads per kv head; part: split_size; most_parts: numbers in Buffers.parts;
    workers: attention items that keep all threads busy. `ranks` says how many columns of the shrunk rows one adapter takes."""

    def __init__(self, group: int, kv_heads: int, part: int, most_parts: int, workers: int):
        self.ranks = 0
        self._per_tile, self._kv_heads = tokens_per_tile(group), kv_heads
        self._part, self._most_parts, self._workers = part, most_parts, workers

    def pack(self, chunks: list[Chunk]) -> StepInput:
        """The arrays of a step; chunks must be ordered so that those with equal adapters are neighbours."""
        rows = [0, *accumulate(chunk.length for chunk in chunks)]
        pages_at = [0, *accumulate(len(chunk.pages) for chunk in chunks)]
        tiles, long = self._tiles(chunks, rows, pages_at)
        wanted = [
            range(row + max(c.first_logits - c.start, 0), row + c.length) for c, row in zip(chunks, rows, strict=False)
        ]
        segments, scales = _segments(chunks, rows, self.ranks)
        out_segments, out_scales = _segments(chunks, [0, *accumulate(map(len, wanted))], self.ranks)
        return StepInput(
            _numbers([token for c in chunks for token in c.tokens[c.start : c.start + c.length]]),
            _numbers([position for c in chunks for position in range(c.start, c.start + c.length)]),
            _numbers([at for c, at in zip(chunks, pages_at, strict=False) for _ in range(c.length)]),
            _numbers([page for c in chunks for page in c.pages]),
            tiles,
            long,
            segments,
            scales,
            _numbers([row for w in wanted for row in w]),
            out_segments,
            out_scales,
        )

    def _tiles(self, chunks: list[Chunk], rows: list[int], pages_at: list[int]) -> tuple[np.ndarray, np.ndarray]:
        tiles: list[tuple[int, ...]] = []
        long: list[tuple[int, ...]] = []
        parts = 0
        spare = len(chunks) * self._kv_heads < self._workers
        for chunk, row, pages in zip(chunks, rows, pages_at, strict=False):
            splits = (chunk.start + chunk.length + SPLIT - 1) // SPLIT
            room = parts + splits * self._part <= self._most_parts
            if spare and chunk.length == 1 and splits > 1 and room:
                long.append((row, chunk.start, pages, splits, parts))
                parts += splits * self._part
                continue
            for first in range(0, chunk.length, self._per_tile):
                count = min(self._per_tile, chunk.length - first)
                tiles.append((row + first, count, chunk.start + first, pages))
        # Long tiles first, so that threads come free together at the end.
        tiles.sort(key=lambda tile: -tile[TILE_POSITION])
        return _table(tiles, 4), _table(long, 5)


def _table(rows: list[tuple[int, ...]], columns: int) -> np.ndarray:
    return np.array(rows, np.int64).reshape(-1, columns)


def _numbers(values: list[int]) -> np.ndarray:
    return np.array(values, np.int64)


def _segments(chunks: list[Chunk], rows: list[int], ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Runs of rows with equal adapters; a run with several adapters is there once for each, in their order."""
    segments: list[tuple[int, ...]] = []
    scales: list[float] = []
    at = 0 if any(chunk.uses for chunk in chunks) else len(chunks)
    while at < len(chunks):
        end = at + 1
        while end < len(chunks) and chunks[end].uses == chunks[at].uses:
            end += 1
        if rows[at] < rows[end]:
            segments += [(rows[at], rows[end], use.slot, i * ranks) for i, use in enumerate(chunks[at].uses)]
            scales += [use.scale for use in chunks[at].uses]
        at = end
    return _table(segments, 4), np.array(scales, np.float32)
