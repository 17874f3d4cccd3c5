"""Cases of one format of numbers turned into another."""

import numpy as np

from .. import convert, lora_pack, reference
from ..formats import GROUPS, INT8
from ..quantize import fit_ranges
from .case import Arguments, Case, normal


def _make_fit(rng: np.random.Generator, size: dict[str, int]) -> Arguments:
    weight = normal(rng, size["groups"] * size["group"]) * np.float32(0.02)
    weight[: size["group"]] = 0.3
    return weight, size["group"], np.zeros(size["groups"], np.float32), np.zeros(size["groups"], np.float32)


CASES = [
    Case(
        "narrow",
        convert.narrow,
        reference.narrow,
        lambda rng, s: (normal(rng, s["n"]), s["n"], np.zeros(s["n"] + 16, np.uint16), 16),
        0,
        ({"n": 16}, {"n": 4096}),
        ({"n": 1 << 22},),
        lambda s: 6 * s["n"],
    ),
    Case(
        "widen",
        convert.widen,
        reference.widen,
        lambda rng, s: (normal(rng, s["n"]).astype(np.float16).view(np.uint16), s["n"], np.zeros(s["n"], np.float32)),
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
            normal(rng, s["panels"] * s["inner"] * 16),
            s["panels"],
            s["inner"],
            s["together"],
            s.get("offset", 0),
            np.zeros(s["panels"] * lora_pack.panel_bytes(s["inner"], INT8), np.uint8),
            0,
        ),
        0,
        (
            {"panels": 1, "inner": 1, "together": 1},
            {"panels": 5, "inner": 33, "together": 1},
            {"panels": 5, "inner": 34, "together": 2},
            {"panels": 5, "inner": 36, "together": 4, "offset": 128},
        ),
        ({"panels": 128, "inner": 2048, "together": 2},),
        lambda s: 64 * s["panels"] * s["inner"],
    ),
    Case(
        "fit_ranges",
        fit_ranges,
        reference.fit_ranges,
        _make_fit,
        2e-3,
        tuple({"groups": 9, "group": g} for g in GROUPS),
        ({"groups": 4096, "group": 64},),
        lambda s: 4 * s["groups"] * s["group"],
    ),
]
