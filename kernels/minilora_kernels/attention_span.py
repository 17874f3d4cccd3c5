"""The positions of one split whose values are summed, and the keys that are asked for meanwhile.

These are as many as the values, and asked for one line after the other, whatever the order in which values are read: so
the CPU asks ahead by itself. Where a tile's columns do not divide those of a head, it runs over the end of subpages into
what lies behind: mostly the next one, and a few lines lost where that is elsewhere.
"""

from typing import NamedTuple

import numpy as np

from .jit import kernel
from .pages import SUBPAGE, Cursor, Query, cursor_at, token_at, values_behind


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
def keys_beside(kv, span, d):
    """The cursor of the keys that are asked for beside the first subpage's values, columns from d on."""
    columns = d * ((span.end - span.first + SUBPAGE - 1) // SUBPAGE)
    subpages = columns // kv.size
    position, page, slot, _ = cursor_at(kv, span.ahead + subpages * SUBPAGE)
    return Cursor(position, page, slot, columns - subpages * kv.size)


@kernel
def key_at(kv, span, cursor):
    """Where the first of the keys that follow lies in a subpage, counted in tokens; -1 where there are none."""
    if cursor.position >= span.following.position + span.following.tokens:
        return -1
    return token_at(kv, span.following, span.pages, cursor)
