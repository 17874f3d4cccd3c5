"""Cases of adapters' kernels."""

import numpy as np

from .. import lora, lora_pack, reference
from ..formats import FLOAT16, FLOAT32, FORMAT_NAMES, INT8
from ..inputs import Rows
from ..lora_expand import Place
from ..pack import padded_rows
from .case import Arguments, Case, normal
from .linear import empty_rows


def _inputs(rng: np.random.Generator, count: int, columns: int, group: int) -> Rows:
    """`count` rows from the second on; what lies behind their columns is no part of them."""
    rows = empty_rows(1 + count, padded_rows(columns) + 64)
    rows.fine[:] = rng.integers(-(1 << 14), 1 << 14, len(rows.fine))
    for r in range(1, 1 + count):
        values = normal(rng, columns)
        rows.values[r * rows.stride : r * rows.stride + columns] = values
        reference.quantize_row_finely(values, 0, columns, group, rows, r, 0)
    return rows


def _lora_cases(fmt: int) -> list[Case]:
    shrink, gather, expand = lora.make_lora(fmt)
    twin_shrink, twin_gather, twin_expand = reference.make_lora(fmt)
    quantized = fmt == INT8

    def make_shrink(rng: np.random.Generator, s: dict[str, int]) -> Arguments:
        ranks, columns, count, padded = s["R"], s["K"], s["M"], -(-s["R"] // 16) * 16
        a = lora_pack.pack_shrink([normal(rng, ranks * columns).reshape(ranks, columns)], fmt)
        x, shrunk, scale = (
            _inputs(rng, count, columns, s["group"]),
            np.zeros(count * padded, np.float32),
            np.float32(0.5),
        )
        return a, 0, 0, columns, s["group"], padded // 16 - 1, x, 1, count, scale, Place(shrunk, 0, padded, 16)

    def make_expand(rng: np.random.Generator, s: dict[str, int]) -> Arguments:
        rank, rows, count, step, column = (
            lora_pack.padded_rank(s["R"]),
            s["N"],
            s["M"],
            s.get("step", 16),
            s.get("column", 0),
        )
        b = lora_pack.pack_expand(normal(rng, rows * s["R"]).reshape(rows, s["R"]), fmt)
        stride, out_stride = -(-(column + rank) // 16) * 16, rows // 16 * step
        shrunk, out = normal(rng, count * stride), normal(rng, count * out_stride)
        if quantized:
            shrunk = reference.to_wide(shrunk)
        from_place, to_place = Place(shrunk, 0, stride, 16), Place(out, 0, out_stride, step)
        return b, 0, rank, 1, rows // 16, 0, from_place, column, count, to_place

    def make_gather(rng: np.random.Generator, s: dict[str, int]) -> Arguments:
        ranks, tokens, panels = s["R"], s["V"], -(-s["R"] // 16)
        a = lora_pack.pack_gather(normal(rng, ranks * tokens).reshape(ranks, tokens), fmt)
        return a, 0, tokens, panels, tokens - 1, np.float32(2), np.zeros(16 * panels, np.float32), 0

    def numbers(shrunk: np.ndarray) -> list[np.ndarray]:
        """Shrunk numbers, from their words: two integers may differ by one, the numbers hardly."""
        return [reference.from_wide(shrunk) if quantized else shrunk]

    name = FORMAT_NAMES[fmt]
    shrinks = tuple(
        {"R": r, "K": k, "M": m, "group": group}
        for r, k, m, group in ((1, 64, 1, 64), (24, 80, 5, 32), (24, 96, 5, 32), (48, 256, 9, 128))
    )
    expands = tuple(
        {"R": r, "N": n, "M": m, "step": step, "column": column}
        for r, n, m, step, column in (
            (1, 32, 1, 16, 0),
            (8, 64, 5, 32, 12),
            (8, 96, 6, 16, 8),
            (12, 64, 4, 16, 4),
            (17, 48, 8, 16, 4),
            (16, 160, 1, 16, 16),
        )
    )
    return [
        Case(
            f"shrink {name}",
            shrink,
            twin_shrink,
            make_shrink,
            1e-4 if quantized else 3e-6,
            shrinks,
            ({"R": 16, "K": 2048, "M": 1, "group": 32}, {"R": 16, "K": 2048, "M": 256, "group": 32}),
            lambda s: lora_pack.panel_bytes(s["K"], fmt),
            lambda s: s["M"] * 16 * s["K"],
            read=lambda arguments: numbers(arguments[10].array),
        ),
        Case(
            f"expand {name}",
            expand,
            twin_expand,
            make_expand,
            3e-6,
            expands,
            ({"R": 16, "N": 2048, "M": 1}, {"R": 16, "N": 2048, "M": 256}),
            lambda s: s["N"] // 16 * lora_pack.panel_bytes(s["R"], fmt),
            lambda s: s["M"] * s["R"] * s["N"],
            read=lambda arguments: [arguments[9].array],
        ),
        Case(
            f"gather {name}",
            gather,
            twin_gather,
            make_gather,
            1e-4 if quantized else 1e-6,
            ({"R": 5, "V": 40}, {"R": 16, "V": 3}, {"R": 40, "V": 7}),
            ({"R": 16, "V": 4096},),
            lambda s: s["R"] * 4,
            read=lambda arguments: numbers(arguments[6]),
        ),
    ]


CASES = [case for fmt in (FLOAT32, FLOAT16, INT8) for case in _lora_cases(fmt)]
