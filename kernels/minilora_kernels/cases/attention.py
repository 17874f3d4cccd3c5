"""Cases of attention over pages, and of writing them."""

import numpy as np

from .. import attention, reference
from ..attention import make_attention, part_scratch_size, partial_size, scratch_size
from ..pages import (
    KV,
    KV_FLOAT16,
    KV_FLOAT32,
    KV_INT8,
    KV_NAMES,
    NOBODY,
    RUN,
    SPLIT,
    Query,
    empty_pool,
    make_write,
    token_bytes,
)
from .case import Arguments, Case, Make, Scratch, new_scratch, normal


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
        content = normal(rng, len(kv.numbers))
        kv.numbers[:] = content if kv_format == KV_FLOAT32 else content.astype(np.float16).view(np.uint16)
    return kv, rng.permutation(pages).astype(np.int64)


def _attention_arguments(
    rng: np.random.Generator, kv_format: int, s: dict[str, int]
) -> tuple[KV, np.ndarray, Query, np.ndarray, int]:
    kv, pages = make_pool(rng, kv_format, s["position"] + s["tokens"], s["heads"], s["size"], s.get("page", 32))
    query = Query(1, s["heads"] - 1, s["group"], s["position"], s["tokens"], s.get("window", 0), 0)
    stride = s["group"] * s["size"]
    return kv, pages, query, normal(rng, s["tokens"] * stride), stride


def _make_attend(kv_format: int) -> Make:
    def make(rng: np.random.Generator, s: dict[str, int]) -> Arguments:
        kv, pages, query, q, stride = _attention_arguments(rng, kv_format, s)
        scratch = new_scratch(scratch_size(s["tokens"] * s["group"], s["size"]))
        return kv, query, pages, NOBODY, q, 0, stride, np.zeros_like(q), 0, stride, scratch, 0

    return make


def _make_attend_part(kv_format: int) -> Make:
    def make(rng: np.random.Generator, s: dict[str, int]) -> Arguments:
        kv, pages = make_pool(rng, kv_format, s["position"] + 1, s["heads"], s["size"], s.get("page", 32))
        query = Query(1, 0, s["group"], s["position"], 1, s.get("window", 0), 0)
        rows, splits = s["heads"] * s["group"], s["position"] // SPLIT + 1
        return (
            kv,
            query,
            pages,
            s["heads"],
            s["low"],
            s["high"],
            normal(rng, rows * s["size"]),
            0,
            np.zeros(splits * rows * partial_size(s["size"]), np.float32),
            0,
            new_scratch(part_scratch_size(s["heads"], s["group"], s["size"])),
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
        # From its sixth token on nothing is seen of the first split.
        {"position": 540, "tokens": 12, "heads": 1, "group": 3, "size": 64, "window": 290},
    )
    large = tuple({"position": p, "tokens": t, "heads": 1, "group": 4, "size": 64} for p, t in ((4095, 1), (504, 8)))
    small_64 = tuple(s for s in small if s["size"] % 64 == 0)
    part = (
        {"position": 0, "heads": 1, "group": 1, "size": 16, "low": 0, "high": 1},
        {"position": 300, "heads": 2, "group": 3, "size": 64, "low": 0, "high": 4},
        {"position": 600, "heads": 3, "group": 5, "size": 80, "low": 4, "high": 8, "page": 64},
        {"position": 700, "heads": 3, "group": 13, "size": 128, "low": 4, "high": 8, "page": 96, "window": 290},
        {"position": 600, "heads": 2, "group": 2, "size": 64, "low": 4, "high": 6, "window": 33},
        {"position": 300, "heads": 2, "group": 3, "size": 64, "low": 2, "high": 2},
    )
    part_64 = tuple(s for s in part if s["size"] % 64 == 0)
    write = tuple({"size": d, "slot": i, "page": 64} for d, i in ((16, 0), (80, 37)))

    def make_token(rng: np.random.Generator, s: dict[str, int]) -> Arguments:
        kv, _ = make_pool(rng, kv_format, 64, 2, s["size"], s["page"])
        return kv, 1, 1, s["slot"], 1, normal(rng, s["size"] + 4), 4

    def cost(s: dict[str, int]) -> int:
        return 2 * (s["position"] + s["tokens"]) * token_bytes(kv_format, s["size"])

    def work(s: dict[str, int]) -> int:
        return 2 * s["group"] * s["size"] * sum(s["position"] + t + 1 for t in range(s["tokens"]))

    def part_cost(s: dict[str, int]) -> int:
        return 2 * (s["high"] - s["low"]) * SPLIT * token_bytes(kv_format, s["size"])

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
                part_cost,
            )
            for label, kernel, sizes in ((name, attend_part, part), (name_64, attend_part_64, part_64))
        ),
        *(
            Case(
                f"{twin.__name__} {name}",
                kernel,
                twin,
                make_token,
                1e-6,
                write,
                ({"size": 64, "slot": 3, "page": 32},),
                lambda s: token_bytes(kv_format, s["size"]),
            )
            for kernel, twin in ((write_key, reference.write_key), (write_value, reference.write_value))
        ),
    ]


def _make_merge(rng: np.random.Generator, s: dict[str, int]) -> Arguments:
    parts = normal(rng, s["splits"] * 3 * partial_size(s["size"])).reshape(-1, partial_size(s["size"]))
    parts[:, -1] = np.abs(parts[:, -1]) + 1
    parts[3 * s["unseen"] + 1, -2:] = -np.inf, 0
    flat = parts.reshape(-1).view(Scratch)
    return flat, 0, s["splits"], 3, 1, s["size"], np.zeros(s["size"], np.float32), 0


CASES = [
    *(case for kv_format in (KV_FLOAT32, KV_FLOAT16, KV_INT8) for case in _attention_cases(kv_format)),
    Case(
        "merge_parts",
        attention.merge_parts,
        reference.merge_parts,
        _make_merge,
        1e-5,
        ({"splits": 2, "size": 16, "unseen": 0}, {"splits": 5, "size": 80, "unseen": 1}),
        ({"splits": 16, "size": 64, "unseen": 0},),
        lambda s: 4 * s["splits"] * s["size"],
    ),
]
