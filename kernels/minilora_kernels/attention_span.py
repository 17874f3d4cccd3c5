"""The positions of one split whose values are summed, and the keys that are asked for meanwhile.

These are as many as the values, less what is asked for beside weights, and asked for one line after the other, whatever
the order in which values are read: so the CPU asks ahead by itself. Where a tile's columns do not divide those of a head, it runs over the end of subpages into
what lies behind: mostly the next one, and a few lines lost where that is elsewhere.
"""

from typing import NamedTuple

import numpy as np

from .jit import kernel
from .memory import CACHE_LINE
from .pages import SUBPAGE, Cursor, Query, cursor_at, token_at, values_behind
from .simd_memory import prefetch_beside


class Span(NamedTuple):
    """Positions first .. end of a query's text; next come keys of `following`, from position `ahead` on."""

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
    """The cursor of the keys of which so many subpages lie behind, and for each subpage of values so many columns."""
    columns *= subpages_of(span)
    subpages = columns // kv.size
    position, page, slot, _ = cursor_at(kv, span.ahead + (skipped + subpages) * SUBPAGE)
    return Cursor(position, page, slot, columns - subpages * kv.size)


@kernel
def key_at(kv, span, cursor):
    """Where the first of the keys that follow lies in a subpage, counted in tokens; -1 where there are none."""
    if cursor.position >= span.following.position + span.following.tokens:
        return -1
    return token_at(kv, span.following, span.pages, cursor)


@kernel
def ask_scales(kv, token):
    """Ask for the scales of a subpage of int8 numbers."""
    for n in range(0, SUBPAGE, CACHE_LINE // 4):
        prefetch_beside(kv.scales, token + n)
