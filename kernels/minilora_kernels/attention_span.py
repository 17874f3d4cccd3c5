"""The positions of one split whose values are summed, and the keys that are prefetched meanwhile.

As many subpages of keys are prefetched as there are of values, less those prefetched while weights are computed; in
address order, however the values are read, so that the hardware prefetcher joins in. Where a tile's width does not
divide the head size, prefetches run past a subpage's end: usually into the next one, else a few lines are wasted.
"""

from typing import NamedTuple

import numpy as np

from .jit import kernel
from .memory import CACHE_LINE
from .pages import SUBPAGE, Cursor, Query, cursor_at, token_at, values_behind
from .simd_memory import prefetch_soon


class Span(NamedTuple):
    """Positions first .. end of a query's text; the keys of `following` are next, from position `ahead` on."""

    query: Query
    pages: np.ndarray
    first: int
    end: int
    following: Query
    ahead: int


@kernel
def value_at(kv, span, cursor):
    """Where the first value of a subpage lies, counted in tokens."""
    return token_at(kv, span.query, span.pages, cursor) + values_behind(kv)


@kernel
def subpages_of(span):
    """How many subpages the positions lie in."""
    return (span.end - span.first + SUBPAGE - 1) // SUBPAGE


@kernel
def keys_beside(kv, span, skipped, columns):
    """The cursor of the next keys, after `skipped` subpages and, for each subpage of values, `columns` columns."""
    columns *= subpages_of(span)
    subpages = columns // kv.size
    position, page, slot, _ = cursor_at(kv, span.ahead + (skipped + subpages) * SUBPAGE)
    return Cursor(position, page, slot, columns - subpages * kv.size)


@kernel
def key_at(kv, span, cursor):
    """Where the first of the next keys lies in the cursor's subpage, counted in tokens; -1 where there are none."""
    if cursor.position >= span.following.position + span.following.tokens:
        return -1
    return token_at(kv, span.following, span.pages, cursor)


@kernel
def prefetch_scales(kv, token):
    """Prefetch the scales of a subpage of int8 numbers."""
    for n in range(0, SUBPAGE, CACHE_LINE // 4):
        prefetch_soon(kv.scales, token + n)
