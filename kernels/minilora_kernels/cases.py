"""One row for each public kernel: its twin, how to make inputs, how close the two must be, and what it costs.

Tests and bench/kernels.py both loop over CASES; a new kernel is a function, a twin and a row here.
"""

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from . import attention, convert, lora, lora_pack, pointwise, reference, sample
from .attention import make_attention, partial_size, scratch_size
from .jit import program
from .linear import Rows, make_linear
from .pack import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FORMAT_NAMES,
    INT4,
    INT4_MIN,
    INT8,
    INT8_MIN,
    Quantized,
    bits,
    has_minimum,
    is_float,
    pack_float,
    pack_quantized,
    packed_bytes,
    padded_rows,
    table_row,
)
from .pages import (
    KV,
    KV_FLOAT16,
    KV_FLOAT32,
    KV_INT8,
    KV_NAMES,
    NOBODY,
    RUN,
    Query,
    empty_pool,
    make_write,
    token_bytes,
)
from .quantize import fit_ranges

Arguments = tuple[Any, ...]
Make = Callable[[np.random.Generator, dict[str, int]], Arguments]


@dataclass(frozen=True)
class Case:
    """A kernel and all that is needed to check and to time it.

    kernel, twin: the compiled function and its NumPy twin; make: arguments for the given sizes; tolerance: largest
    difference, relative to the largest number of the twin's result; small, large: sizes for tests and for the
    benchmark; bytes, operations: of one call, for sizes (bytes read from memory, multiply-adds); read: what is compared
    of the arguments, by default all arrays.
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
        """The largest relative difference of all arrays that the two leave behind, and of what they return."""
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


def _scratch(count: int, dtype=np.float32) -> np.ndarray:
    return np.full(count, -1, dtype).view(Scratch)


def _difference(x: Any, y: Any) -> float:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    finite = np.isfinite(y)
    if not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return np.inf
    return float(np.abs(x[finite] - y[finite]).max(initial=0) / max(np.abs(y[finite]).max(initial=0), 1e-30))


def _normal(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.standard_normal(count, dtype=np.float32)


# ---------------------------------------------------------------- linear


def random_matrix(rng: np.random.Generator, fmt: int, rows: int, columns: int, group: int) -> np.ndarray:
    """The packed bytes of a random matrix of any format."""
    if is_float(fmt):
        return pack_float(_normal(rng, rows * columns).reshape(rows, columns), fmt)
    groups = (rows, columns // group)
    scales = (rng.random(groups, np.float32) * 0.01).astype(np.float16)
    minima = (_normal(rng, rows * groups[1]).reshape(groups) * 0.01).astype(np.float16) if has_minimum(fmt) else None
    values = rng.integers(0, 1 << bits(fmt), (rows, columns), np.uint8)
    return pack_quantized(Quantized(values, scales, minima, bits(fmt)))


def empty_rows(count: int, width: int) -> Rows:
    """Room for the inputs of a product."""
    groups = count * width // 32
    return Rows(
        np.zeros(count * width, np.float32),
        np.zeros(count * width, np.int8),
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
            values = _normal(rng, k)
            rows.values[r * rows.stride : r * rows.stride + k] = values
            if group:
                reference.quantize_row(values, 0, k, group, rows, r, 0)
        table = np.array([table_row(fmt, n, k, group, 0)], np.int64)
        out = _normal(rng, m * padded_rows(n))
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
        )

    return make


def _linear_case(fmt: int) -> Case:
    group = {} if is_float(fmt) else {"group": 32}
    tests = [{"N": 80, "K": 96, "M": m, **group, "add": m % 2} for m in (1, 3, 8, 15)]
    if group:
        tests += [{"N": 64, "K": 256, "M": 5, "group": g} for g in (64, 128)]
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


# ---------------------------------------------------------------- pointwise


def _weight_bytes(rng: np.random.Generator, n: int) -> np.ndarray:
    return _normal(rng, n).view(np.uint8)


def _make_norm(rng: np.random.Generator, size: dict[str, int]) -> Arguments:
    n = size["n"]
    return _normal(rng, n), 0, n, _weight_bytes(rng, n), 0, np.float32(1e-5), np.zeros(n, np.float32), 0


def _make_quantize(rng: np.random.Generator, size: dict[str, int]) -> Arguments:
    n, group = size["n"], size["group"]
    x = _normal(rng, n)
    x[:group] = 0
    return x, 0, n, group, empty_rows(2, 2 * n), 1, n


def _make_silu(rng: np.random.Generator, size: dict[str, int]) -> Arguments:
    return 6 * _normal(rng, 32 * size["panels"]), 0, size["panels"], np.zeros(16 * size["panels"], np.float32), 0


def _make_add(rng: np.random.Generator, size: dict[str, int]) -> Arguments:
    return _normal(rng, size["n"]), 0, _weight_bytes(rng, size["n"]), 0, size["n"]


def _make_rope(rng: np.random.Generator, size: dict[str, int]) -> Arguments:
    half = size["half"]
    angles = rng.random(3 * half, np.float32) * 6
    return _normal(rng, 2 * half + 16), 8, half, np.cos(angles), np.sin(angles), half


def _make_embed(fmt: int) -> Make:
    def make(rng: np.random.Generator, size: dict[str, int]) -> Arguments:
        group = 0 if is_float(fmt) else 32
        table = np.array([table_row(fmt, size["V"], size["E"], group, 0)], np.int64)
        return (
            random_matrix(rng, fmt, size["V"], size["E"], group),
            table,
            0,
            size["token"],
            np.zeros(size["E"], np.float32),
            0,
        )

    return make


def _embed_case(fmt: int) -> Case:
    return Case(
        f"embed {FORMAT_NAMES[fmt]}",
        pointwise.embed,
        reference.embed,
        _make_embed(fmt),
        1e-6,
        tuple({"V": 96, "E": 64, "token": t} for t in (0, 17, 95)),
        ({"V": 4096, "E": 2048, "token": 777},),
        bytes=lambda s: s["E"] * bits(fmt) // 8,
    )


# ---------------------------------------------------------------- attention


def make_pool(
    rng: np.random.Generator, kv_format: int, tokens: int, heads: int, size: int, page: int = 32
) -> tuple[KV, np.ndarray]:
    """A pool of two layers with random content in its second, and a shuffled page table for `tokens` tokens."""
    pages = (-(-tokens // page) + 2 + RUN - 1) // RUN * RUN
    kv = empty_pool(kv_format, pages, 2, heads, size, page)
    if kv_format == KV_INT8:
        # No byte is that of a key of -128, which quantisation never gives.
        kv.numbers[:] = rng.integers(1, 256, len(kv.numbers))
        kv.scales[:] = rng.random(len(kv.scales)) * 0.02
    else:
        content = _normal(rng, len(kv.numbers))
        kv.numbers[:] = content if kv_format == KV_FLOAT32 else content.astype(np.float16).view(np.uint16)
    return kv, rng.permutation(pages).astype(np.int64)


def _attention_arguments(
    rng: np.random.Generator, kv_format: int, s: dict[str, int]
) -> tuple[KV, np.ndarray, Query, np.ndarray, int]:
    kv, pages = make_pool(rng, kv_format, s["position"] + s["tokens"], s["heads"], s["size"], s.get("page", 32))
    query = Query(1, s["heads"] - 1, s["group"], s["position"], s["tokens"], s.get("window", 0), 0)
    stride = s["group"] * s["size"]
    return kv, pages, query, _normal(rng, s["tokens"] * stride), stride


def _make_attend(kv_format: int) -> Make:
    def make(rng: np.random.Generator, s: dict[str, int]) -> Arguments:
        kv, pages, query, q, stride = _attention_arguments(rng, kv_format, s)
        scratch = _scratch(scratch_size(s["tokens"] * s["group"], s["size"]))
        return kv, query, pages, 0, NOBODY, q, 0, stride, np.zeros_like(q), 0, stride, scratch, 0

    return make


def _make_attend_part(kv_format: int) -> Make:
    def make(rng: np.random.Generator, s: dict[str, int]) -> Arguments:
        kv, pages, query, q, stride = _attention_arguments(rng, kv_format, s)
        rows = s["tokens"] * s["group"]
        return (
            kv,
            query,
            pages,
            s["split"],
            0,
            query,
            1,
            q,
            0,
            stride,
            np.zeros(rows * partial_size(s["size"]), np.float32),
            0,
            _scratch(scratch_size(rows, s["size"])),
            0,
        )

    return make


def _attention_cases(kv_format: int) -> list[Case]:
    write_key, write_value = make_write(kv_format)
    attend, attend_part = make_attention(kv_format)
    attend_64, attend_part_64 = make_attention(kv_format, 64)
    # With int8 pages queries and weights are rounded to 14 bits, which the twin does not do.
    name, close = KV_NAMES[kv_format], 5e-4 if kv_format == KV_INT8 else 2e-5
    small = (
        {"position": 0, "tokens": 1, "heads": 1, "group": 1, "size": 16},
        {"position": 300, "tokens": 1, "heads": 2, "group": 3, "size": 64},
        {"position": 250, "tokens": 9, "heads": 1, "group": 4, "size": 80, "page": 64},
        {"position": 600, "tokens": 4, "heads": 1, "group": 2, "size": 128, "window": 290},
    )
    large = tuple({"position": p, "tokens": t, "heads": 1, "group": 4, "size": 64} for p, t in ((4095, 1), (504, 8)))
    small_64 = tuple(s for s in small if s["size"] % 64 == 0)
    part = tuple({**s, "split": split} for s in small[1:] for split in (0, 1))
    part_64 = tuple(s for s in part if s["size"] % 64 == 0)
    write = tuple({"size": d, "slot": i, "page": 64} for d, i in ((16, 0), (80, 37)))

    def make_token(rng: np.random.Generator, s: dict[str, int]) -> Arguments:
        kv, _ = make_pool(rng, kv_format, 64, 2, s["size"], s["page"])
        return kv, 1, 1, s["slot"], 1, _normal(rng, s["size"] + 4), 4

    def cost(s: dict[str, int]) -> int:
        return 2 * (s["position"] + s["tokens"]) * token_bytes(kv_format, s["size"])

    def work(s: dict[str, int]) -> int:
        return 2 * s["group"] * s["size"] * sum(s["position"] + t + 1 for t in range(s["tokens"]))

    name_64 = f"{name}, 64 columns at a time"
    return [
        *(
            Case(f"attend {label}", kernel, reference.attend, _make_attend(kv_format), close, sizes, timed, cost, work)
            for label, kernel, sizes, timed in ((name, attend, small, ()), (name_64, attend_64, small_64, large))
        ),
        *(
            Case(
                f"attend_part {label}",
                kernel,
                reference.attend_part,
                _make_attend_part(kv_format),
                close,
                sizes,
                (),
                cost,
                work,
            )
            for label, kernel, sizes in ((name, attend_part, part), (name_64, attend_part_64, part_64))
        ),
        Case(
            f"write_key {name}",
            write_key,
            reference.write_key,
            make_token,
            1e-6,
            write,
            ({"size": 64, "slot": 3, "page": 32},),
            lambda s: token_bytes(kv_format, s["size"]),
        ),
        Case(
            f"write_value {name}",
            write_value,
            reference.write_value,
            make_token,
            1e-6,
            write,
            ({"size": 64, "slot": 3, "page": 32},),
            lambda s: token_bytes(kv_format, s["size"]),
        ),
    ]


def _make_merge(rng: np.random.Generator, s: dict[str, int]) -> Arguments:
    parts = _normal(rng, s["splits"] * 3 * partial_size(s["size"])).reshape(-1, partial_size(s["size"]))
    parts[:, -1] = np.abs(parts[:, -1]) + 1
    parts[3, -2:] = -np.inf, 0
    flat = parts.reshape(-1).view(Scratch)
    return flat, 0, s["splits"], 3, 1, s["size"], np.zeros(s["size"], np.float32), 0


# ---------------------------------------------------------------- LoRA


def _lora_cases(fmt: int) -> list[Case]:
    shrink, gather, expand = lora.make_lora(fmt)
    twin_shrink, twin_gather, twin_expand = reference.make_lora(fmt)
    quantized = fmt == INT8

    def make_shrink(rng: np.random.Generator, s: dict[str, int]) -> Arguments:
        ranks, columns, count, padded = s["R"], s["K"], s["M"], -(-s["R"] // 16) * 16
        a = lora_pack.pack_shrink([_normal(rng, ranks * columns).reshape(ranks, columns)], fmt)
        x, shrunk, scale = _normal(rng, count * columns), np.zeros(count * padded, np.float32), np.float32(0.5)
        return a, 0, 0, columns, padded // 16 - 1, x, 0, columns, count, scale, shrunk, 0, padded

    def make_expand(rng: np.random.Generator, s: dict[str, int]) -> Arguments:
        rank, rows, count, step, column = (
            lora_pack.padded_rank(s["R"]),
            s["N"],
            s["M"],
            s.get("step", 16),
            s.get("column", 0),
        )
        b = lora_pack.pack_expand(_normal(rng, rows * s["R"]).reshape(rows, s["R"]), fmt)
        stride, out_stride = -(-(column + rank) // 16) * 16, rows // 16 * step
        shrunk, out = _normal(rng, count * stride), _normal(rng, count * out_stride)
        if quantized:
            shrunk = reference.to_digits(shrunk)
        return b, 0, rank, 1, rows // 16, 0, shrunk, 0, column, stride, count, out, 0, out_stride, step

    def make_gather(rng: np.random.Generator, s: dict[str, int]) -> Arguments:
        ranks, tokens, panels = s["R"], s["V"], -(-s["R"] // 16)
        a = lora_pack.pack_shrink([_normal(rng, ranks * tokens).reshape(ranks, tokens)], fmt)
        return a, 0, tokens, panels, tokens - 1, np.float32(2), np.zeros(16 * panels, np.float32), 0

    def shrunk(at: int) -> Callable[[Arguments], list[np.ndarray]]:
        """How to read the shrunk numbers in argument `at`: from digits, which differ by one where numbers hardly do."""
        return lambda arguments: [reference.from_digits(arguments[at]) if quantized else arguments[at]]

    name = FORMAT_NAMES[fmt]
    shrinks = tuple({"R": r, "K": k, "M": m} for r, k, m in ((1, 64, 1), (24, 96, 5), (48, 128, 9)))
    expands = tuple(
        {"R": r, "N": n, "M": m, "step": step, "column": column}
        for r, n, m, step, column in ((1, 32, 1, 16, 0), (8, 64, 5, 32, 12), (17, 48, 8, 16, 4), (16, 160, 1, 16, 16))
    )
    return [
        Case(
            f"shrink {name}",
            shrink,
            twin_shrink,
            make_shrink,
            1e-4 if quantized else 3e-6,
            shrinks,
            ({"R": 16, "K": 2048, "M": 1}, {"R": 16, "K": 2048, "M": 256}),
            lambda s: lora_pack.panel_bytes(s["K"], fmt),
            lambda s: s["M"] * 16 * s["K"],
            read=shrunk(10),
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
            read=lambda arguments: [arguments[11]],
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
            read=shrunk(6),
        ),
    ]


# ---------------------------------------------------------------- sampling


def _logits(rng: np.random.Generator, size: dict[str, int]) -> np.ndarray:
    """levels: only so many different ones, so that many are equal; bad: the place of a NaN, and of infinity behind it."""
    x = 3 * _normal(rng, size["V"])
    if "levels" in size:
        x = np.round(x * size["levels"] / 6) * np.float32(6 / size["levels"])
    x[-3:] = -np.inf
    if "bad" in size:
        x[size["bad"]], x[size["bad"] + 1] = np.nan, np.inf
    return x


def _make_row(rng: np.random.Generator, size: dict[str, int]) -> Arguments:
    return _logits(rng, size), 0, size["V"]


def _make_rank(rng: np.random.Generator, size: dict[str, int]) -> Arguments:
    return _logits(rng, size), 0, size["V"], int(rng.integers(size["V"] - 3))


def _make_top(rng: np.random.Generator, size: dict[str, int]) -> Arguments:
    return (
        _logits(rng, size),
        0,
        size["V"],
        size["k"],
        np.zeros(size["k"] + 2, np.int64),
        np.zeros(size["k"] + 2, np.float32),
        1,
    )


def _make_uniform(rng: np.random.Generator, size: dict[str, int]) -> Arguments:
    return np.uint64(rng.integers(1 << 62)), size["position"]


def _make_sample(rng: np.random.Generator, size: dict[str, int]) -> Arguments:
    v = size["V"]
    return (
        _logits(rng, size),
        0,
        v,
        np.float32(size.get("t", 100) / 100),
        size.get("k", 0),
        np.float32(size.get("p", 100) / 100),
        np.float32(size.get("min_p", 0) / 1000),
        rng.random(),
        _scratch(v),
        _scratch(v, np.int64),
        0,
    )


_SAMPLING = tuple(
    {"V": v, **more}
    for v in (64, 2048, 8192)
    for more in (
        {},
        {"t": 60},
        {"k": 1},
        {"k": 40},
        {"p": 90},
        {"p": 50, "k": 20},
        {"min_p": 50},
        {"t": 300, "p": 99},
        {"min_p": 10, "k": 8, "p": 80},
        {"levels": 3, "p": 90},
        {"levels": 3, "k": 30},
        {"levels": 4, "k": 50, "p": 70},
        {"t": 5000, "k": 16},
        {"t": 5000, "k": 48, "p": 60},
        {"t": 200, "k": 32, "min_p": 20},
        {"bad": 7},
        {"bad": 20, "k": 5, "p": 90},
    )
)


def _make_fit(rng: np.random.Generator, size: dict[str, int]) -> Arguments:
    weight = _normal(rng, size["groups"] * size["group"]) * np.float32(0.02)
    weight[: size["group"]] = 0.3
    return weight, size["group"], np.zeros(size["groups"], np.float32), np.zeros(size["groups"], np.float32)


def _row_bytes(size: dict[str, int]) -> int:
    return 4 * size["V"]


_VOCABULARIES = ({"V": 49152}, {"V": 151936})

CASES: list[Case] = [
    *(_linear_case(fmt) for fmt in (FLOAT32, FLOAT16, BFLOAT16, INT8, INT8_MIN, INT4, INT4_MIN)),
    Case(
        "rms_norm",
        pointwise.rms_norm,
        reference.rms_norm,
        _make_norm,
        1e-6,
        ({"n": 16}, {"n": 144}, {"n": 576}),
        ({"n": 2048},),
        lambda s: 8 * s["n"],
    ),
    Case(
        "quantize_row",
        pointwise.quantize_row,
        reference.quantize_row,
        _make_quantize,
        1e-6,
        tuple({"n": 256, "group": g} for g in (32, 64, 128)),
        ({"n": 2048, "group": 32},),
        lambda s: 4 * s["n"],
    ),
    Case(
        "silu_mul",
        pointwise.silu_mul,
        reference.silu_mul,
        _make_silu,
        1e-6,
        ({"panels": 1}, {"panels": 6}),
        ({"panels": 128},),
        lambda s: 128 * s["panels"],
    ),
    Case(
        "add_row",
        pointwise.add_row,
        reference.add_row,
        _make_add,
        0,
        ({"n": 16}, {"n": 96}),
        ({"n": 2048},),
        lambda s: 8 * s["n"],
    ),
    Case(
        "rope",
        pointwise.rope,
        reference.rope,
        _make_rope,
        1e-6,
        tuple({"half": h} for h in (8, 16, 40, 64)),
        ({"half": 64},),
        lambda s: 8 * s["half"],
    ),
    *(_embed_case(fmt) for fmt in (FLOAT32, FLOAT16, BFLOAT16, INT8, INT8_MIN, INT4, INT4_MIN)),
    *(case for kv_format in (KV_FLOAT32, KV_FLOAT16, KV_INT8) for case in _attention_cases(kv_format)),
    Case(
        "merge_parts",
        attention.merge_parts,
        reference.merge_parts,
        _make_merge,
        1e-5,
        ({"splits": 2, "size": 16}, {"splits": 5, "size": 80}),
        ({"splits": 16, "size": 64},),
        lambda s: 4 * s["splits"] * s["size"],
    ),
    *(case for fmt in (FLOAT32, FLOAT16, INT8) for case in _lora_cases(fmt)),
    Case("argmax", sample.argmax, reference.argmax, _make_row, 0, ({"V": 16}, {"V": 3008}), _VOCABULARIES, _row_bytes),
    Case(
        "log_sum_exp",
        sample.log_sum_exp,
        reference.log_sum_exp,
        _make_row,
        1e-6,
        ({"V": 16}, {"V": 3008}),
        _VOCABULARIES,
        _row_bytes,
    ),
    Case("rank", sample.rank, reference.rank, _make_rank, 0, ({"V": 16}, {"V": 3008}), _VOCABULARIES, _row_bytes),
    Case(
        "top",
        sample.top,
        reference.top,
        _make_top,
        0,
        ({"V": 64, "k": 1}, {"V": 3008, "k": 20}),
        ({"V": 151936, "k": 20},),
        _row_bytes,
    ),
    Case(
        "uniform",
        sample.uniform,
        reference.uniform,
        _make_uniform,
        0,
        tuple({"position": p} for p in (0, 1, 99999)),
        (),
        lambda s: 0,
    ),
    Case(
        "sample",
        sample.sample,
        reference.sample,
        _make_sample,
        0,
        _SAMPLING,
        tuple({"V": v, **more} for v in (49152, 151936) for more in ({}, {"k": 50, "p": 95}, {"p": 95})),
        _row_bytes,
    ),
    Case(
        "narrow",
        convert.narrow,
        reference.narrow,
        lambda rng, s: (_normal(rng, s["n"]), s["n"], np.zeros(s["n"] + 16, np.uint16), 16),
        0,
        ({"n": 16}, {"n": 4096}),
        ({"n": 1 << 22},),
        lambda s: 6 * s["n"],
    ),
    Case(
        "widen",
        convert.widen,
        reference.widen,
        lambda rng, s: (_normal(rng, s["n"]).astype(np.float16).view(np.uint16), s["n"], np.zeros(s["n"], np.float32)),
        0,
        ({"n": 16}, {"n": 4096}),
        ({"n": 1 << 22},),
        lambda s: 6 * s["n"],
    ),
    Case(
        "quantize_panels",
        convert.quantize_panels,
        reference.quantize_panels,
        lambda rng, s: (
            _normal(rng, s["panels"] * s["inner"] * 16),
            s["panels"],
            s["inner"],
            s.get("words", 0) == 1,
            np.zeros(s["panels"] * lora_pack.panel_bytes(s["inner"], INT8), np.uint8),
            0,
        ),
        0,
        ({"panels": 1, "inner": 1}, {"panels": 5, "inner": 33}, {"panels": 5, "inner": 36, "words": 1}),
        ({"panels": 128, "inner": 2048},),
        lambda s: 64 * s["panels"] * s["inner"],
    ),
    Case(
        "fit_ranges",
        fit_ranges,
        reference.fit_ranges,
        _make_fit,
        2e-3,
        tuple({"groups": 9, "group": g} for g in (32, 64, 128)),
        ({"groups": 4096, "group": 64},),
        lambda s: 4 * s["groups"] * s["group"],
    ),
]
