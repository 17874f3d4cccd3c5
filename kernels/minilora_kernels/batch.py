"""What one step computes, as its caller hands it over and as kernels see it.

It is passed as two arrays: one array per part would cost tens of microseconds a call, most of it reading array headers.
"""

from collections.abc import Collection
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

from .jit import kernel
from .sample import make_sample, uniform

# Columns of tiles: a tile is a few consecutive tokens of one sequence.
TILE_ROW, TILE_TOKENS, TILE_POSITION, TILE_PAGES = range(4)
# Columns of long: a token whose positions are shared out in splits (see pages.SPLIT), with room for all of them in
# `parts` from LONG_PARTS on.
LONG_ROW, LONG_POSITION, LONG_PAGES, LONG_PARTS = range(4)
# Columns of segments: a run of rows with one adapter, and where its part of the shrunk rows begins.
SEGMENT_FIRST, SEGMENT_END, SEGMENT_SLOT, SEGMENT_COLUMN = range(4)
# Columns of choices: a token to choose.
CHOICE_ROW, CHOICE_TOP_K, CHOICE_SEED, CHOICE_POSITION = range(4)
# Columns of cuts.
CUT_TEMPERATURE, CUT_TOP_P, CUT_MIN_P = range(3)
# The unit that programs with `choose` need.
SAMPLING = make_sample.unit()
[_sample] = SAMPLING.kernels
# Instead of a token: the chosen one's logit was not finite; none was chosen yet.
NO_NUMBER, NOT_CHOSEN = -1, -2


# An array in kernels; before it is packed a flat list, a table row after row.
Part = np.ndarray | Collection


class StepRows(NamedTuple):
    """T rows of a step, those of a sequence together: int64, then float32.

    tokens, positions, pages_at: [T]; pages_at: where in `pages` the row's sequence starts. tiles: [n, 4] and
    long: [n, 4], what attention has to do, each row in one of them. segments: [S, 4], first row, end row, slot and
    first column in the shrunk rows of each run of rows with one adapter; scales: [S], factors on these adapters.
    """

    tokens: Part
    positions: Part
    pages_at: Part
    tiles: Part
    long: Part
    segments: Part
    scales: Part


class StepInput(NamedTuple):
    """What one step computes beside its rows: int64, then float32.

    pages: page numbers, sequence after sequence. out_rows: rows whose logits are wanted, rising. choices: [n, 4],
    tokens to choose: the row, counted in out_rows, top_k, and the key of the random number, seed and position; cuts:
    [n, 3], temperature (0 for the best token), top_p and min_p; chosen: [rounds, n], the answers.

    In a step of several rounds all this is the first one's. In each later one every row holds the token that the
    previous one chose for it, one position on: there row r, out_rows[r] and choices[r] belong to one text. ends: tokens
    that most likely end a text; after a round in which all texts end there is no other.
    """

    pages: Part
    out_rows: Part
    choices: Part
    ends: Part
    chosen: Part
    cuts: Part


NO_ROWS = StepRows(*[()] * len(StepRows._fields))
# ROWS_INTS: how many parts of StepRows are int64. INTS: how many are in all, of all rows, the wanted ones and
# StepInput; FLOATS: how many are float32, one of each.
ROWS_INTS = len(StepRows._fields) - 1
INTS, FLOATS = 2 * ROWS_INTS + len(StepInput._fields) - 1, 3


class Packed(NamedTuple):
    """A step's rows and StepInput in two arrays, part after part.

    ints starts with the offsets of its own parts (INTS + 1), then those of the parts of floats (FLOATS + 1).
    """

    ints: np.ndarray
    floats: np.ndarray

    @property
    def chosen(self) -> list[int]:
        """What was chosen, round after round; of rounds that were left out NOT_CHOSEN."""
        return self.ints[int(self.ints[INTS - 1]) :].tolist()


def pack(rows: StepRows = NO_ROWS, wanted: StepRows = NO_ROWS, /, **others: Part) -> Packed:
    """All rows, the wanted ones alone, unless these are all, and parts of StepInput by name, as arrays.

    Parts that are not given are empty.
    """
    parts = StepInput(*(others.pop(name, ()) for name in StepInput._fields))
    if others:
        raise TypeError(f"a step's input has no {', '.join(others)}")
    three = rows, wanted, parts
    ints, floats = [part for one in three for part in one[:-1]], [one[-1] for one in three]
    places = [*accumulate(map(len, ints), initial=INTS + 1 + FLOATS + 1), *accumulate(map(len, floats), initial=0)]
    return Packed(
        np.array([*places, *chain.from_iterable(ints)], np.int64), np.array([*chain.from_iterable(floats)], np.float32)
    )


def _view(context, builder, sig, args, shape):
    """The array args[0] from element args[1] on, in this shape."""
    kind = sig.return_type
    size = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
    steps = [size] if len(shape) == 1 else [builder.mul(size, shape[1]), size]
    view = make_array(kind)(context, builder)
    data = make_array(sig.args[0])(context, builder, args[0]).data
    populate_array(view, builder.gep(data, [args[1]]), shape, steps, size, None)
    return view._getvalue()


@intrinsic
def _part(typing_context, array, first, end):
    """array[first:end], which a kernel may return."""

    def codegen(context, builder, sig, args):
        return _view(context, builder, sig, args, [builder.sub(args[2], args[1])])

    return types.Array(array.dtype, 1, "C")(array, types.intp, types.intp), codegen


@intrinsic
def _table(typing_context, array, first, end, columns):
    """array[first:end] in rows of `columns`."""

    def codegen(context, builder, sig, args):
        rows = builder.sdiv(builder.sub(args[2], args[1]), args[3])
        return _view(context, builder, sig, args, [rows, args[3]])

    return types.Array(array.dtype, 2, "C")(array, types.intp, types.intp, types.intp), codegen


@kernel
def _rows(packed, i, scales):
    """StepRows of int64 parts from number i on; its scales are packed.floats[n[scales] : n[scales + 1]]."""
    n = packed.ints
    return StepRows(
        _part(n, n[i], n[i + 1]),
        _part(n, n[i + 1], n[i + 2]),
        _part(n, n[i + 2], n[i + 3]),
        _table(n, n[i + 3], n[i + 4], 4),
        _table(n, n[i + 4], n[i + 5], 4),
        _table(n, n[i + 5], n[i + 6], 4),
        _part(packed.floats, n[scales], n[scales + 1]),
    )


@kernel
def unpack(packed):
    """(StepInput, all rows, the wanted ones alone): views, nothing is copied."""
    n, i, floats = packed.ints, 2 * ROWS_INTS, INTS + 1
    batch = StepInput(
        _part(n, n[i], n[i + 1]),
        _part(n, n[i + 1], n[i + 2]),
        _table(n, n[i + 2], n[i + 3], 4),
        _part(n, n[i + 3], n[i + 4]),
        _part(n, n[i + 4], n[i + 5]),
        _table(packed.floats, n[floats + 2], n[floats + 3], 3),
    )
    rows = _rows(packed, 0, floats)
    wanted = rows if len(batch.out_rows) == len(rows.tokens) else _rows(packed, ROWS_INTS, floats + 1)
    return batch, rows, wanted


@kernel
def rounds_of(batch):
    """How many times a step chooses a token for each of its choices."""
    return len(batch.chosen) // max(1, len(batch.choices))


@kernel
def token_at(batch, rows, turn, row):
    """The token of a row in round `turn`; 0 after one that could not be chosen."""
    if turn == 0:
        return rows.tokens[row]
    return max(0, batch.chosen[(turn - 1) * len(batch.choices) + row])


@kernel
def all_ended(batch, turn):
    """Whether every text has most likely ended with its token of round `turn`."""
    count = len(batch.choices)
    for token in batch.chosen[turn * count : (turn + 1) * count]:
        ended = token < 0
        for end in batch.ends:
            ended = ended or token == end
        if not ended:
            return False
    return True


@kernel
def choose(batch, i, turn, best, x, width, chances, ids, to):
    """Set batch.chosen of choice i in round `turn`, from rows of `width` logits in x; best: the best token of its row.

    NO_NUMBER where the token's logit is not finite. chances, ids, to: scratch, see `sample`.
    """
    at, token = batch.choices[i, CHOICE_ROW] * width, best
    if batch.cuts[i, CUT_TEMPERATURE] > 0:
        draw = uniform(np.uint64(batch.choices[i, CHOICE_SEED]), batch.choices[i, CHOICE_POSITION] + turn)
        temperature, top_p, min_p = batch.cuts[i, CUT_TEMPERATURE], batch.cuts[i, CUT_TOP_P], batch.cuts[i, CUT_MIN_P]
        top_k = batch.choices[i, CHOICE_TOP_K]
        token = _sample(x, at, width, temperature, top_k, top_p, min_p, draw, chances, ids, to)
    batch.chosen[turn * len(batch.choices) + i] = token if np.isfinite(x[at + token]) else NO_NUMBER
