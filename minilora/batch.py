"""The rows of one step: Sequence is the state of a text, pack() makes the flat arrays that the step reads."""

from itertools import accumulate, chain
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from minilora_kernels.attention import SPLIT, partial_size

# Columns of tiles: a tile is a few consecutive tokens of one sequence.
TILE_ROW, TILE_TOKENS, TILE_POSITION, TILE_PAGES = range(4)
# Columns of long: a token whose positions are shared out in splits of 256, with room for all of them in `parts` from
# LONG_PARTS on.
LONG_ROW, LONG_POSITION, LONG_PAGES, LONG_SPLITS, LONG_PARTS = range(5)

ROWS_PER_TILE = 32


class Choices(NamedTuple):
    """Tokens to choose. numbers: int64 [n, 4], the row of logits, top_k, and the key of the random number: seed and
    position; cuts: float32 [n, 3], temperature (0 for the best token), top_p and min_p; tokens: int64 [n], the answers."""

    numbers: np.ndarray
    cuts: np.ndarray
    tokens: np.ndarray


class StepInput(NamedTuple):
    """What one step computes, int64 but for scales. T rows, rows of a sequence together.

    tokens, positions, pages_at: [T]; pages_at: where in `pages` the row's sequence starts. tiles: [n, 4] and
    long: [n, 5], what attention has to do, each row in one of them. segments: [S, 4], first row, end row, slot and
    first column in the shrunk rows of each run of rows with one adapter; scales: float32 [S]. out_rows: rows whose logits are wanted; out_segments,
    out_scales: like segments, counted in out_rows; choices: tokens to choose, rows counted in out_rows.
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
    choices: Choices


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

    def pack(self, chunks: list[Chunk], choices: Choices) -> StepInput:
        """The arrays of a step; chunks must be ordered so that those with equal adapters are neighbours."""
        tokens: list[int] = []
        positions: list[int] = []
        pages: list[int] = []
        pages_at: list[int] = []
        out_rows: list[int] = []
        starts, first_pages, out_starts = [0], [0], [0]
        for chunk in chunks:
            end = chunk.start + chunk.length
            tokens += chunk.tokens[chunk.start : end]
            positions += range(chunk.start, end)
            pages_at += [len(pages)] * chunk.length
            pages += chunk.pages
            out_rows += range(starts[-1] + max(chunk.first_logits - chunk.start, 0), len(tokens))
            starts.append(len(tokens))
            first_pages.append(len(pages))
            out_starts.append(len(out_rows))
        flat = _arrays(tokens, positions, pages_at, pages, out_rows)
        tiles, long = self._tiles(chunks, starts, first_pages)
        segments, scales = _segments(chunks, starts, self.ranks)
        out_segments, out_scales = _segments(chunks, out_starts, self.ranks)
        return StepInput(
            flat[0],
            flat[1],
            flat[2],
            flat[3],
            tiles,
            long,
            segments,
            scales,
            flat[4],
            out_segments,
            out_scales,
            choices,
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
        tiles.sort(key=itemgetter(TILE_POSITION), reverse=True)
        return _table(tiles, 4), _table(long, 5)


def _table(rows: list[tuple[int, ...]], columns: int) -> np.ndarray:
    return np.array(rows, np.int64).reshape(-1, columns)


def _arrays(*lists: list[int]) -> list[np.ndarray]:
    """An int64 array of each list, all in one piece of memory."""
    ends = [*accumulate(map(len, lists))]
    whole = np.array([*chain(*lists)], np.int64)
    return [whole[end - len(values) : end] for values, end in zip(lists, ends, strict=True)]


_NO_SEGMENTS, _NO_SCALES = _table([], 4), np.array([], np.float32)


def _segments(chunks: list[Chunk], rows: list[int], ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Runs of rows with equal adapters; a run with several adapters is there once for each, in their order."""
    if not any(chunk.uses for chunk in chunks):
        return _NO_SEGMENTS, _NO_SCALES
    segments: list[tuple[int, ...]] = []
    scales: list[float] = []
    at = 0
    while at < len(chunks):
        end = at + 1
        while end < len(chunks) and chunks[end].uses == chunks[at].uses:
            end += 1
        if rows[at] < rows[end]:
            segments += [(rows[at], rows[end], use.slot, i * ranks) for i, use in enumerate(chunks[at].uses)]
            scales += [use.scale for use in chunks[at].uses]
        at = end
    return _table(segments, 4), np.array(scales, np.float32)
