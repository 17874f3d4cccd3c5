"""Twins of what chooses tokens."""

import numpy as np

from .flat import span

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def argmax(x, at, n):
    """The index of the largest x[i], the first of equals."""
    return int(np.argmax(span(x, at, n)))


def log_sum_exp(x, at, n):
    """log(sum of exp(x[i]))."""
    v = span(x, at, n).astype(np.float64)
    return v.max() + np.log(np.exp(v - v.max()).sum())


def rank(x, at, n, token):
    """1 + the number of logits greater than x[token]."""
    return int((span(x, at, n) > x[at + token]).sum()) + 1


def top(x, at, n, count, ids, values, to):
    """The `count` largest, falling, the first of equals first."""
    order = np.argsort(-span(x, at, n), kind="stable")[:count]
    ids[to : to + count], values[to : to + count] = order, x[at + order]


def uniform(seed, position):
    """A number in [0, 1) from (seed, position): two rounds of SplitMix64."""
    with np.errstate(over="ignore"):
        state = np.uint64(seed)
        for word in (np.uint64(0), np.uint64(position)):
            state = (state ^ word) + GOLDEN
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return float(state >> np.uint64(11)) / (1 << 53)


def sample(x, at, n, temperature, top_k, top_p, min_p, draw, weights, ids, to):
    """A token drawn from softmax(x / temperature), cut by min_p, then top_k, then top_p."""
    v = span(x, at, n).astype(np.float64)
    if not np.isfinite(v.max()):
        return int(np.argmax(~(v < np.inf)))
    w = np.exp((v - v.max()) / temperature)
    if top_k == 0 and top_p >= 1 and min_p <= 0:
        return int(np.searchsorted(np.cumsum(w), draw * w.sum(), side="right"))
    order = np.argsort(-w, kind="stable")
    order = order[w[order] >= min_p][: top_k or n]
    mass = np.cumsum(w[order])
    if top_p < 1:
        order = order[: np.searchsorted(mass, top_p * mass[-1]) + 1]
    order = np.sort(order)
    mass = np.cumsum(w[order])
    return int(order[min(np.searchsorted(mass, draw * mass[-1], side="right"), len(order) - 1)])
