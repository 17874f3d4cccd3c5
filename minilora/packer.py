"""Filling the arena: a plan's tensors, read from the checkpoint, quantised if asked for, laid out for the kernels."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from minilora_kernels import pack
from minilora_kernels.formats import bits, is_float
from minilora_kernels.memory import aligned_zeros
from minilora_kernels.pack import BLOCK, PANEL
from minilora_kernels.quantize import quantize
from minilora_kernels.quantized import Quantized, convert

from .errors import FormatError
from .plan import Matrix, Part, Plan, Vector
from .weights import Weights

CHUNK_ROWS = 4096


class _Piece(NamedTuple):
    """Rows first .. end of every part, to be packed together."""

    item: Vector
    first: int
    end: int
    parts: tuple[Part, ...]


def _pieces(item: Vector) -> Iterator[_Piece]:
    """Cut a matrix into pieces that are packed by themselves, each a few thousand rows."""
    if item.interleaved:
        rows = item.parts[0].rows
        for first in range(0, rows, CHUNK_ROWS):
            yield _Piece(item, first, min(first + CHUNK_ROWS, rows), item.parts)
    elif all(part.rows % BLOCK == 0 for part in item.parts) or len(item.parts) == 1:
        for part in item.parts:
            for first in range(0, part.rows, CHUNK_ROWS):
                yield _Piece(item, first, min(first + CHUNK_ROWS, part.rows), (part,))
    else:
        yield _Piece(item, 0, max(part.rows for part in item.parts), item.parts)


def _interleave(x: np.ndarray) -> np.ndarray:
    """Two stacked halves taken in turn, 16 rows at a time."""
    return x.reshape(2, -1, PANEL, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)


def _arrange(arrays: list[np.ndarray], interleaved: bool) -> np.ndarray:
    stacked = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return _interleave(stacked) if interleaved else stacked


def _check_finite(name: str, *arrays: np.ndarray | None) -> None:
    for array in arrays:
        if array is not None and not np.isfinite(array).all():
            raise FormatError(f"{name!r} holds a number that is not finite")


class Packer:
    """Turns a plan's tensors into the bytes of the arena."""

    def __init__(self, plan: Plan):
        self._checkpoint, self._plan = plan.checkpoint, plan

    def chunks(self) -> Iterator[np.ndarray]:
        """The arena from its first byte to its last, as uint8 arrays; packed on several threads ahead of use."""
        at = 0
        with ThreadPoolExecutor() as pool:
            for offset, pieces in self._plan_pieces():
                yield np.zeros(offset - at, np.uint8)
                at = offset
                for data in _ahead(pool, self._pack, pieces):
                    yield data
                    at += len(data)
        yield np.zeros(self._plan.size - at, np.uint8)

    def _plan_pieces(self) -> Iterator[tuple[int, Iterator[_Piece]]]:
        for offset, item in self._plan.items:
            yield offset, _pieces(item)

    def _pack(self, piece: _Piece) -> np.ndarray:
        try:
            return self._packed(piece)
        except OverflowError as error:
            names = ", ".join(repr(part.name) for part in piece.parts)
            raise FormatError(f"{names}: {error}", "Take another dtype.") from None

    def _packed(self, piece: _Piece) -> np.ndarray:
        if not isinstance(piece.item, Matrix):
            return np.ascontiguousarray(self._floats(piece)).view(np.uint8)
        if is_float(piece.item.format):
            return pack.pack_float(self._floats(piece), piece.item.format)
        return pack.pack_quantized(self._quantized(piece))

    def _floats(self, piece: _Piece) -> np.ndarray:
        arrays = []
        for part, rows in self._rows(piece):
            arrays.append(self._checkpoint.read_float(part.name, rows))
            _check_finite(part.name, arrays[-1])
        return _arrange(arrays, piece.item.interleaved)

    def _rows(self, piece: _Piece) -> Iterator[tuple[Part, slice]]:
        for part in piece.parts:
            yield part, slice(part.first + piece.first, part.first + min(piece.end, part.rows))

    def _quantized(self, piece: _Piece) -> Quantized:
        item = piece.item
        assert isinstance(item, Matrix)
        done = [self._quantize(part.name, rows, item) for part, rows in self._rows(piece)]

        def stacked(arrays: list[np.ndarray | None]) -> np.ndarray | None:
            there = [array for array in arrays if array is not None]
            return _arrange(there, item.interleaved) if there else None

        return Quantized(
            _arrange([q.values for q in done], item.interleaved),
            _arrange([q.scales for q in done], item.interleaved),
            stacked([q.minima for q in done]),
            bits(item.format),
            stacked([q.units for q in done]),
        )

    def _quantize(self, name: str, rows: slice, item: Matrix) -> Quantized:
        """Rows of a tensor in the item's format: as they are stored where that is possible."""
        if self._plan.target.dtype == "auto":
            stored = self._checkpoint.read(name, rows)
            assert isinstance(stored, Quantized)
            _check_finite(name, stored.scales, stored.minima, stored.units)
            return convert(stored, item.format, item.group)
        weights = self._checkpoint.read_float(name, rows)
        _check_finite(name, weights)
        return quantize(weights, bits(item.format), item.group)


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[_Piece], np.ndarray], pieces: Iterator[_Piece]
) -> Iterator[np.ndarray]:
    """function of each piece, in order, a few of them under way at a time."""
    waiting: deque[Future[np.ndarray]] = deque()
    for piece in pieces:
        waiting.append(pool.submit(function, piece))
        if len(waiting) > 4:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def pack_in_memory(plan: Plan) -> Weights:
    """Pack a model without writing it anywhere."""
    arena, at = aligned_zeros(plan.size), 0
    for chunk in Packer(plan).chunks():
        arena[at : at + len(chunk)] = chunk
        at += len(chunk)
    return Weights(plan.config, arena, plan.matrices, plan.layers, plan.embed, plan.head, plan.final_norm)
