"""The rows of one step: pieces of texts in, the arrays that the step reads out."""

from collections.abc import Collection
from itertools import accumulate, chain
from operator import itemgetter
from typing import NamedTuple

from minilora_kernels.attention import partial_size
from minilora_kernels.batch import NO_ROWS, NOT_CHOSEN, TILE_POSITION, Packed, StepRows, pack
from minilora_kernels.pages import SPLIT

from .params import SamplingParams

ROWS_PER_TILE = 32


class Draw(NamedTuple):
    """A token to draw: from row `row` of the logits, for a text with these parameters. seed: as int64."""

    row: int
    params: SamplingParams
    seed: int
    position: int
    prompt: list[int]
    text: list[int]
    barred: tuple[int, ...]


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

    def wanted(self) -> "Chunk":
        """The part whose logits are wanted; the chunk itself if that is all of it."""
        end = self.start + self.length
        first = min(max(self.first_logits, self.start), end)
        return self if first == self.start else self._replace(start=first, length=end - first)


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
    """Makes a step's input. group: query heads per kv head; part: split_size; most_parts: numbers in Buffers.parts;
    workers: attention items that keep all threads busy. `ranks` says how many columns of the shrunk rows one adapter
    takes."""

    def __init__(self, group: int, kv_heads: int, part: int, most_parts: int, workers: int):
        self.ranks = 0
        self._per_tile, self._kv_heads = tokens_per_tile(group), kv_heads
        self._part, self._most_parts, self._workers = part, most_parts, workers

    def pack(self, chunks: list[Chunk], draws: list[Draw], rounds: int = 1, ends: Collection[int] = ()) -> Packed:
        """The arrays of a step; chunks must be ordered so that those with equal adapters are neighbours.

        rounds: tokens to choose for each draw, where each chunk is one token and has the draw of the same place, and
        pages for all; ends: see StepInput.
        """
        first_pages = [*accumulate((len(chunk.pages) for chunk in chunks), initial=0)]
        wanted = [chunk.wanted() for chunk in chunks]
        out_rows: list[int] = []
        end = 0
        for chunk, part in zip(chunks, wanted, strict=True):
            end += chunk.length
            out_rows += range(end - part.length, end)
        rows = self._rows(chunks, first_pages, rounds)
        some = self._rows(wanted, first_pages, rounds) if len(out_rows) < end else NO_ROWS
        pages = [*chain.from_iterable(chunk.pages for chunk in chunks)]
        return pack(rows, some, pages=pages, out_rows=out_rows, ends=ends, **_choices(draws, rounds))

    def _rows(self, chunks: list[Chunk], first_pages: list[int], rounds: int) -> StepRows:
        """All rows of these chunks. first_pages: where in StepInput's `pages` those of each chunk begin."""
        tokens: list[int] = []
        positions: list[int] = []
        pages_at: list[int] = []
        starts = [0]
        for chunk, page in zip(chunks, first_pages, strict=False):
            end = chunk.start + chunk.length
            tokens += chunk.tokens[chunk.start : end]
            positions += range(chunk.start, end)
            pages_at += [page] * chunk.length
            starts.append(len(tokens))
        tiles, long = self._tiles(chunks, starts, first_pages, rounds)
        segments, scales = _segments(chunks, starts, self.ranks)
        return StepRows(tokens, positions, pages_at, tiles, long, segments, scales)

    def _tiles(
        self, chunks: list[Chunk], rows: list[int], pages_at: list[int], rounds: int
    ) -> tuple[list[int], list[int]]:
        tiles: list[tuple[int, ...]] = []
        long: list[int] = []
        parts = 0
        spare = sum(chunk.length > 0 for chunk in chunks) * self._kv_heads < self._workers
        for chunk, row, pages in zip(chunks, rows, pages_at, strict=False):
            splits = (chunk.start + chunk.length + rounds - 1 + SPLIT - 1) // SPLIT
            room = parts + splits * self._part <= self._most_parts
            if spare and chunk.length == 1 and splits > 1 and room:
                long += (row, chunk.start, pages, parts)
                parts += splits * self._part
                continue
            for first in range(0, chunk.length, self._per_tile):
                count = min(self._per_tile, chunk.length - first)
                tiles.append((row + first, count, chunk.start + first, pages))
        # Long tiles first, so that threads come free together at the end.
        tiles.sort(key=itemgetter(TILE_POSITION), reverse=True)
        return [*chain.from_iterable(tiles)], long


def pack_draws(draws: list[Draw]) -> Packed:
    """Nothing but tokens to choose."""
    return pack(**_choices(draws, 1))


def _choices(draws: list[Draw], rounds: int) -> dict[str, list]:
    """StepInput's parts for tokens to choose."""
    choices: list[int] = []
    cuts: list[float] = []
    for draw in draws:
        choices += (draw.row, draw.params.top_k, draw.seed, draw.position)
        cuts += draw.params.cuts
    return {"choices": choices, "cuts": cuts, "chosen": [NOT_CHOSEN] * (rounds * len(draws))}


def _segments(chunks: list[Chunk], rows: list[int], ranks: int) -> tuple[list[int], list[float]]:
    """Runs of rows with equal adapters; a run with several adapters is there once for each, in their order."""
    if not any(chunk.uses for chunk in chunks):
        return [], []
    segments: list[int] = []
    scales: list[float] = []
    at = 0
    while at < len(chunks):
        end = at + 1
        while end < len(chunks) and chunks[end].uses == chunks[at].uses:
            end += 1
        if rows[at] < rows[end]:
            for i, use in enumerate(chunks[at].uses):
                segments += (rows[at], rows[end], use.slot, i * ranks)
                scales.append(use.scale)
        at = end
    return segments, scales
