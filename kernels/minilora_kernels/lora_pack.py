"""How an adapter's A and B lie in memory.

All matrices of an adapter that read the same input are shrunk at once: A is stored transposed as
[R / 16 panels][K][16] with the ranks of those matrices side by side, each padded to a multiple of 4 (R: their sum,
padded to 16). B of each matrix is stored as [N / 16 panels][rank][16], alpha / rank folded in. Both lie in a uint8
arena as float32, float16 or int8. A panel of int8 begins with 16 float32 scales, one for each of its 16 rows of A or
B, and its numbers lie as the dot products need them: A's as [K / 2][16][2], unless it is an embedding's, of which one
column is read at a time; B's, + 128, as [rank / 4][16][4].
"""

import numpy as np

from .convert import narrow_float16, quantize_panels_int8
from .formats import FLOAT32, INT8, bits
from .pack import PANEL


def padded_rank(rank: int) -> int:
    """A rank, padded with zeros to whole words of four bytes."""
    return -(-rank // 4) * 4


def pack_shrink(parts: list[np.ndarray], fmt: int) -> np.ndarray:
    """A [R, K] as fmt, uint8: the parts below each other, each from a multiple of 4 on; K is a multiple of 16.

    Raises OverflowError where a number is too large for float16.
    """
    return _pack(_stack(parts), fmt, 2, 0)


def pack_gather(a: np.ndarray, fmt: int) -> np.ndarray:
    """A [R, vocabulary] of an embedding as fmt, uint8. Raises as pack_shrink does."""
    return _pack(_stack([a]), fmt, 1, 0)


def _stack(parts: list[np.ndarray]) -> np.ndarray:
    """Matrices below each other, each from a multiple of 4 on, whole panels of rows."""
    rows = sum(padded_rank(len(part)) for part in parts)
    stacked, at = np.zeros((-(-rows // PANEL) * PANEL, parts[0].shape[1]), np.float32), 0
    for part in parts:
        stacked[at : at + len(part)] = part
        at += padded_rank(len(part))
    return stacked


def pack_expand(b: np.ndarray, fmt: int) -> np.ndarray:
    """B [N, rank] as fmt, uint8, alpha / rank folded in; N is a multiple of 16. Raises as pack_shrink does."""
    return _pack(np.pad(b, ((0, 0), (0, padded_rank(b.shape[1]) - b.shape[1]))), fmt, 4, 128)


def _pack(matrix: np.ndarray, fmt: int, together: int, offset: int) -> np.ndarray:
    """Panels of 16 rows; of int8 numbers, + offset, `together` columns of a row lie side by side."""
    rows, inner = matrix.shape
    panels = np.ascontiguousarray(matrix.reshape(-1, PANEL, inner).transpose(0, 2, 1), np.float32).reshape(-1)
    if fmt == FLOAT32:
        return panels.view(np.uint8)
    out = np.empty(rows // PANEL * panel_bytes(inner, fmt), np.uint8)
    if fmt == INT8:
        quantize_panels_int8(panels, inner, together, offset, out, 0)
    else:
        narrow_float16(panels, out.view(np.uint16), 0)
    return out


def panel_bytes(inner: int, fmt: int) -> int:
    """Bytes of a panel of 16 rows of `inner` numbers each."""
    return head_bytes(fmt) + inner * PANEL * number_bytes(fmt)


def head_bytes(fmt: int) -> int:
    """Bytes of a panel's scales, which come first."""
    return 4 * PANEL if fmt == INT8 else 0


def number_bytes(fmt: int) -> int:
    """Bytes of a number of an adapter."""
    return bits(fmt) // 8
