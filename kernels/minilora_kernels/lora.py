"""Segmented LoRA: y += (x A) B for runs of rows that share an adapter, never merged into the base weights.

LoRA: Hu et al. 2021, arXiv:2106.09685; segmented shrink and expand: after Punica, Chen et al. 2023, arXiv:2310.18547.
How A and B lie in memory: see `lora_pack`. Sums run in a fixed order: see the tiles in `lora_shrink` and `lora_expand`.
"""

from numba import types
from numba.core.typing import signature

from .inputs import INPUTS
from .jit import kernel
from .kinds import BYTES, FLOATS, NUMBER, named
from .lora_expand import Panels, Place, expand_rows, row_of, rows_at_once
from .lora_pack import head_bytes, number_bytes
from .lora_shrink import TILE_ROWS, gather_panel, most_rows, shrink_tile
from .pack import PANEL
from .unit import unit

_PLACE, _SCALE = named(Place, FLOATS), types.float32
_SHRINK = signature(types.none, BYTES, *[NUMBER] * 5, INPUTS, *[NUMBER] * 2, _SCALE, _PLACE)
_GATHER = signature(types.none, BYTES, *[NUMBER] * 4, _SCALE, FLOATS, NUMBER)
_EXPAND = signature(types.none, BYTES, *[NUMBER] * 5, _PLACE, *[NUMBER] * 2, _PLACE)


@unit(lambda fmt: (_SHRINK, _GATHER, _EXPAND))
def make_lora(fmt: int):
    """(shrink, gather, expand) for adapters stored as FLOAT32, FLOAT16 or INT8."""
    shrink_some, expand_some, most, several = shrink_tile(fmt), expand_rows(fmt), most_rows(fmt), rows_at_once(fmt)
    gather_one, size, head = gather_panel(fmt), number_bytes(fmt), head_bytes(fmt)

    @kernel
    def shrink(arena, at, following, columns, group, panel, x, x_row, rows, scale, s):
        """s[m, 16 * panel + i] = scale * sum over k of x[x_row + m, k] * A[16 * panel + i, k], m < rows, i < 16.

        arena: uint8, A's panels from byte `at`; columns: K, a multiple of 16; x: Rows, of which int8 adapters read
        `fine`, in groups of `group` columns, others `values`; s: the Place of row 0; int8 adapters store wide integers
        there, 16 numbers in 16 places, see wide.store_sixteen. following: the byte that is likely to be read after this
        panel, for prefetching.
        """
        at += panel * (head + columns * PANEL * size)
        m, s_at = 0, s.at + panel * PANEL
        while rows - m >= most:
            shrink_some(most, arena, at, following, columns, group, x, x_row + m, scale, s.array, s_at, s.stride)
            m, s_at = m + most, s_at + most * s.stride
        if most > TILE_ROWS and rows - m >= TILE_ROWS:
            shrink_some(TILE_ROWS, arena, at, following, columns, group, x, x_row + m, scale, s.array, s_at, s.stride)
            m, s_at = m + TILE_ROWS, s_at + TILE_ROWS * s.stride
        while m < rows:
            shrink_some(1, arena, at, following, columns, group, x, x_row + m, scale, s.array, s_at, s.stride)
            m, s_at = m + 1, s_at + s.stride

    @kernel
    def gather(arena, at, columns, panels, token, scale, s, s_at):
        """s[i] = scale * A[i, token], i < 16 * panels: shrink for an embedding, whose input is a token number.

        arena: uint8, A's panels from byte `at`; columns: the vocabulary's size.
        """
        for panel in range(panels):
            gather_one(arena, at, token, scale, s, s_at + panel * PANEL)
            at += head + columns * PANEL * size

    @kernel
    def expand(arena, at, rank, panel0, panel1, prefetch_at, s, column, rows, out):
        """out[m, panel p] += sum over r < rank of s[m, column + r] * B[p, r], m < rows, panel0 <= p < panel1.

        arena: uint8, B's panels from byte `at`; rank, column: multiples of 4; s, out: Places of row 0, of `out` of its
        panel0; s is as shrink leaves it. prefetch_at: the byte from which on as many panels are likely to be read soon;
        the address of panel0 itself for no prefetching.
        """
        panel = head + rank * PANEL * size
        first, count = at + panel0 * panel, panel1 - panel0
        m = 0
        # Rows in the outer loop: a row's part of `out` is contiguous, and B stays in caches. Only the first prefetch.
        while m < rows:
            b = Panels(arena, first, count, panel, prefetch_at - first if m == 0 else 0)
            s_m, out_m = row_of(s, m), row_of(out, m)
            if rows - m >= several:
                expand_some(several, b, rank, s_m, column, out_m)
                m += several
            else:
                expand_some(1, b, rank, s_m, column, out_m)
                m += 1

    return shrink, gather, expand
