"""Cases of what works on a row of activations, and of the embedding."""

import numpy as np

from .. import pointwise, quantize_rows, reference
from ..formats import FORMAT_NAMES, FORMATS, GROUPS, bits, group_of
from ..pack import table_row
from .case import Arguments, Case, Make, normal
from .linear import empty_rows, random_matrix

_ROUNDED = 0x3F808000, 0x3F818000, 0x3F818001, 0xBF80FFFF, 0x7F7FFFFF, 0x7F800000, 0x00018000, 1, 0x7FC00001, 0xFFFFFFFF


def _weight_bytes(rng: np.random.Generator, n: int) -> np.ndarray:
    return normal(rng, n).view(np.uint8)


def _make_norm(rng: np.random.Generator, size: dict[str, int]) -> Arguments:
    n = size["n"]
    return normal(rng, n), 0, n, _weight_bytes(rng, n), 0, np.float32(1e-5), np.zeros(n, np.float32), 0


def _make_quantize(rng: np.random.Generator, size: dict[str, int]) -> Arguments:
    n, group = size["n"], size["group"]
    x = normal(rng, n)
    x[:group] = 0
    return x, 0, n, group, empty_rows(2, 2 * n + 64), 1, 2 * group


def _make_round(rng: np.random.Generator, size: dict[str, int]) -> Arguments:
    n = size["n"]
    x = normal(rng, n)
    # Halfway between two bfloat16, both ways, what rounds up to infinity, subnormal numbers and what is none.
    x.view(np.uint32)[:10] = _ROUNDED
    return x, 0, n, empty_rows(2, 2 * n + 64), 1, 16


def _make_silu(rng: np.random.Generator, size: dict[str, int]) -> Arguments:
    gate_up = 6 * normal(rng, 32 * size["panels"])
    # Gates beyond what exp takes, too.
    gate_up[:10] = -87, -88, -89, -120, -128, -150, -250, -700, 100, 700
    return gate_up, 0, size["panels"], np.zeros(16 * size["panels"], np.float32), 0


def _make_add(rng: np.random.Generator, size: dict[str, int]) -> Arguments:
    return normal(rng, size["n"]), 0, _weight_bytes(rng, size["n"]), 0, size["n"]


def _make_rope(rng: np.random.Generator, size: dict[str, int]) -> Arguments:
    half = size["half"]
    angles = rng.random(3 * half, np.float32) * 6
    return normal(rng, 2 * half + 16), 8, half, np.cos(angles), np.sin(angles), half


def _make_embed(fmt: int) -> Make:
    def make(rng: np.random.Generator, size: dict[str, int]) -> Arguments:
        group = group_of(fmt, size["group"])
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
        tuple({"V": 96, "E": 768, "token": t, "group": g} for t, g in ((0, 16), (17, 32), (95, 64), (80, 128))),
        ({"V": 4096, "E": 2048, "token": 777, "group": 32},),
        bytes=lambda s: s["E"] * bits(fmt) // 8,
    )


CASES = [
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
    *(
        Case(
            name,
            getattr(quantize_rows, name),
            getattr(reference, name),
            _make_quantize,
            1e-6,
            (*({"n": 640, "group": g} for g in GROUPS), {"n": 80, "group": 32}),
            ({"n": 2048, "group": 32}, {"n": 2048, "group": 128}),
            lambda s: 4 * s["n"],
        )
        for name in ("quantize_row", "quantize_row_finely")
    ),
    Case(
        "round_row",
        quantize_rows.round_row,
        reference.round_row,
        _make_round,
        0,
        ({"n": 16}, {"n": 96}),
        ({"n": 2048},),
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
    *(_embed_case(fmt) for fmt in range(len(FORMATS))),
]
