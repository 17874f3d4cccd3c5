"""Cases of the choice of a token."""

import numpy as np

from .. import reference, sample
from .case import Arguments, Case, new_scratch, normal


def _logits(rng: np.random.Generator, size: dict[str, int]) -> np.ndarray:
    """levels: how many different values, so that many are equal; bad: the place of a NaN, with infinity after it."""
    x = 3 * normal(rng, size["V"])
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
        new_scratch(v),
        new_scratch(v, np.int64),
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


def _row_bytes(size: dict[str, int]) -> int:
    return 4 * size["V"]


_VOCABULARIES = ({"V": 49152}, {"V": 151936})

CASES = [
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
]
