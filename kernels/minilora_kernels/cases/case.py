"""What a case is, and how a kernel is compared with its twin."""

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..jit import program

Arguments = tuple[Any, ...]
Make = Callable[[np.random.Generator, dict[str, int]], Arguments]


@dataclass(frozen=True)
class Case:
    """A kernel and all that is needed to check and to time it.

    kernel, twin: the compiled function and its NumPy twin; make: arguments for the given sizes; tolerance: largest
    difference, relative to the largest number of the twin's result; small, large: sizes for tests and for the
    benchmark; bytes, operations: of one call, for sizes (bytes read, multiply-adds; narrow and widen count what they
    write, too, write_key and write_value that alone); read: what is compared of the arguments, by default all arrays.
    """

    name: str
    kernel: Any
    twin: Callable
    make: Make
    tolerance: float
    small: tuple[dict[str, int], ...]
    large: tuple[dict[str, int], ...]
    bytes: Callable[[dict[str, int]], int]
    operations: Callable[[dict[str, int]], int] = lambda size: 0
    constants: tuple = ()
    read: Callable[[Arguments], Iterable[np.ndarray]] | None = None

    @property
    def compiled(self) -> Callable:
        """The kernel as a program that Python can call."""
        return _compiled(self.kernel, (self.name, *self.constants))

    def compare(self, rng: np.random.Generator, size: dict[str, int]) -> float:
        """The largest relative difference of all arrays that the two leave, and of what they return."""
        mine = self.make(rng, size)
        theirs = deepcopy(mine)
        results = [(self.compiled(*mine), self.twin(*theirs))]
        read = self.read or _arrays
        results += list(zip(read(mine), read(theirs), strict=True))
        return max((_difference(x, y) for x, y in results if x is not None), default=0.0)


@cache
def _compiled(kernel, key):
    return program(kernel, key)


def _arrays(values: Any) -> Iterator[np.ndarray]:
    """All arrays among arguments, but scratch, whose contents don't matter."""
    for value in values:
        if isinstance(value, Scratch):
            continue
        if isinstance(value, np.ndarray):
            yield value
        elif isinstance(value, tuple):
            yield from _arrays(value)


class Scratch(np.ndarray):
    """Marks an array as scratch for `compare`; kernels see a plain array."""


def new_scratch(count: int, dtype=np.float32) -> np.ndarray:
    """Scratch as a kernel may find it: numbers that no result may depend on."""
    return np.full(count, -1).astype(dtype).view(Scratch)


def _difference(x: Any, y: Any) -> float:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    finite = np.isfinite(y)
    if not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return np.inf
    return float(np.abs(x[finite] - y[finite]).max(initial=0) / max(np.abs(y[finite]).max(initial=0), 1e-30))


def normal(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random numbers, float32, of mean 0 and variance 1."""
    return rng.standard_normal(count, dtype=np.float32)
