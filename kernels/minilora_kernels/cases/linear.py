"""Cases of the products, one for each format of weights."""

import numpy as np

from .. import reference
from ..formats import FORMAT_NAMES, FORMATS, SUPER, bits, group_of, has_minimum, is_float, is_nested, rounds_inputs
from ..inputs import GROUP_MIN, Rows
from ..linear import make_linear, room_bytes
from ..pack import pack_float, pack_quantized, packed_bytes, padded_rows, table_row
from ..quantized import Quantized
from .case import Arguments, Case, Make, new_scratch, normal


def random_matrix(rng: np.random.Generator, fmt: int, rows: int, columns: int, group: int) -> np.ndarray:
    """The packed bytes of a random matrix of any format."""
    if is_float(fmt):
        return pack_float(normal(rng, rows * columns).reshape(rows, columns), fmt)
    groups = (rows, columns // group)
    values = rng.integers(0, 1 << bits(fmt), (rows, columns), np.uint8)
    if is_nested(fmt):
        kinds = 1 + has_minimum(fmt)
        scales, minima = rng.integers(-128, 128, (2, *groups), np.int8)
        units = (normal(rng, rows * columns // SUPER * kinds) * 1e-4).astype(np.float16).reshape(rows, -1, kinds)
    else:
        scales = (rng.random(groups, np.float32) * 0.01).astype(np.float16)
        minima = (normal(rng, rows * groups[1]).reshape(groups) * 0.01).astype(np.float16)
        units = None
    return pack_quantized(Quantized(values, scales, minima if has_minimum(fmt) else None, bits(fmt), units))


def empty_rows(count: int, width: int) -> Rows:
    """Room for the inputs of a product."""
    groups = count * width // GROUP_MIN
    return Rows(
        np.zeros(count * width, np.float32),
        np.zeros(count * width, np.int16),
        np.zeros(count * width, np.int8),
        np.zeros(count * width, np.int16),
        np.zeros(groups, np.float32),
        np.zeros(groups, np.int32),
        np.zeros(groups, np.float32),
        width,
    )


def _make_linear(fmt: int) -> Make:
    def make(rng: np.random.Generator, size: dict[str, int]) -> Arguments:
        n, k, m, group = size["N"], size["K"], size["M"], size.get("group", 0)
        rows = empty_rows(m, padded_rows(k) + 64)
        for r in range(m):
            values = normal(rng, k)
            rows.values[r * rows.stride : r * rows.stride + k] = values
            if rounds_inputs(fmt):
                reference.round_row(values, 0, k, rows, r, 0)
            elif not is_float(fmt):
                reference.quantize_row(values, 0, k, group, rows, r, 0)
        table = np.array([table_row(fmt, n, k, group_of(fmt, group), 0)], np.int64)
        out = normal(rng, m * padded_rows(n))
        return (
            random_matrix(rng, fmt, n, k, group),
            table,
            0,
            rows,
            0,
            m,
            0,
            padded_rows(n) // 32,
            out,
            0,
            padded_rows(n),
            size.get("add", 0),
            new_scratch(2 * room_bytes(table), np.uint8),
            room_bytes(table),
        )

    return make


def _linear_case(fmt: int) -> Case:
    group = {} if is_float(fmt) else {"group": 32}
    columns = 512 if is_nested(fmt) else 96
    tests = [{"N": 80, "K": columns, "M": m, **group, "add": m % 2} for m in (1, 3, 8, 15, 33)]
    if group:
        tests += [{"N": 64, "K": 256, "M": m, "group": g} for m in (5, 20) for g in (16, 64, 128)]
    shapes = [{"N": 2048, "K": 2048, "M": m, **group} for m in (1, 8, 512)]
    if group:
        shapes += [{"N": 2048, "K": 2048, "M": m, "group": g} for m in (1, 512) for g in (64, 128)]
    return Case(
        f"linear {FORMAT_NAMES[fmt]}",
        make_linear((fmt,)),
        reference.linear,
        _make_linear(fmt),
        3e-6,
        tuple(tests),
        tuple(shapes),
        bytes=lambda s: packed_bytes(fmt, s["N"], s["K"], s.get("group", 0)),
        operations=lambda s: s["M"] * s["N"] * s["K"],
    )


CASES = [_linear_case(fmt) for fmt in range(len(FORMATS))]
