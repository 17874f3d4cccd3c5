"""Named tuples by address: what a kernel reads there is what the caller wrote."""

from collections import namedtuple
from typing import NamedTuple

import numpy as np
import pytest
from numba.core.errors import TypingError

from minilora_kernels.held import by_value, hold
from minilora_kernels.jit import kernel, program


class Innermost(NamedTuple):
    offset: np.float32


class Inner(NamedTuple):
    weights: np.ndarray
    most: Innermost
    factor: np.float32
    last: bool


class Outer(NamedTuple):
    first: bool
    table: np.ndarray
    inner: Inner
    turn: int


@kernel
def _dot(inner, table):
    total = np.float32(0)
    for i in range(len(inner.weights)):
        total += inner.weights[i] * table[1, i]
    return total * inner.factor + inner.most.offset


@kernel
def _record(c, out):
    out[c.turn, 0] = _dot(c.inner, c.table)
    out[c.turn, 1] = _dot(by_value(c.inner), c.table)
    out[c.turn, 2] = (1 if c.first else 0) + (2 if c.inner.last else 0)
    c.inner.weights[0] += 1


@kernel
def _turns(outer, out):
    for turn in range(len(out)):
        _record(hold(Outer(turn == 0, outer.table, outer.inner, turn)), out)


@kernel
def _misspelt(outer, out):
    out[0, 0] = hold(outer).tabel[0]


@kernel
def _no_tuple(outer, out):
    hold(out)


@kernel
def _no_address(outer, out):
    by_value(outer)


@kernel
def _first(content):
    return content.a


def _firsts(one, other):
    return _first(hold(one)), _first(hold(other))


def arguments():
    weights = np.array([1, 2, 3], np.float32)
    table = np.arange(6, dtype=np.float32).reshape(2, 3)
    return Outer(False, table, Inner(weights, Innermost(np.float32(8)), np.float32(0.5), True), 7), np.zeros(
        (3, 3), np.float32
    )


def test_fields_inner_tuples_and_what_is_written_through_them():
    outer, out = arguments()
    program(_turns)(outer, out)
    expected = [8 + 0.5 * (3 * (1 + turn) + 4 * 2 + 5 * 3) for turn in range(3)]
    assert out[:, 0].tolist() == out[:, 1].tolist() == expected
    assert out[:, 2].tolist() == [3, 2, 2]
    assert outer.inner.weights[0] == 4


@pytest.mark.parametrize("wrong", [_misspelt, _no_tuple, _no_address])
def test_unknown_fields_and_the_wrong_kind_do_not_compile(wrong):
    with pytest.raises(TypingError):
        program(wrong)(*arguments())


@pytest.mark.parametrize("last", [3, 0.5])
def test_types_that_differ_in_the_order_of_their_fields(last):
    """All of one kind, and not: Numba has an array of fields, or a structure of them."""
    one, other = namedtuple("Place", "a b x"), namedtuple("Place", "b a x")
    assert program(_firsts)(one(a=1, b=2, x=last), other(a=10, b=20, x=last)) == (1, 10)
