"""Choosing the next token from a row of logits.

A row has `n` logits in float32, padded to a multiple of 16 with -inf. All sums run in index order, so a row's
choice depends on its own logits, parameters and random number only.
"""

import numpy as np

from .jit import kernel
from .simd import count_above, exp, f32x16, hmax, hsum, load_f32, splat_f32, store_f32, tile, vmax

CHUNK = 1024

ZERO, ONE = np.float32(0), np.float32(1)
LOWEST = np.float32(-np.inf)

_four = tile(f32x16, 4)


@kernel
def _largest(x, at, n):
    found = splat_f32(LOWEST)
    for i in range(0, n, 16):
        found = vmax(found, load_f32(x, at + i))
    return hmax(found)


@kernel
def argmax(x, at, n):
    """The index i < n of the largest x[i], the first of equals. x: float32, n a multiple of 16."""
    best, chunk = LOWEST, 0
    for first in range(0, n, CHUNK):
        here = _largest(x, at + first, min(CHUNK, n - first))
        if here > best:
            best, chunk = here, first
    for i in range(chunk, min(chunk + CHUNK, n)):
        if x[at + i] == best:
            return i
    return 0


@kernel
def log_sum_exp(x, at, n):
    """log(sum over i < n of exp(x[i])). x: float32, n a multiple of 16."""
    largest = _largest(x, at, n)
    shift, total = splat_f32(largest), np.float64(0)
    for first in range(0, n, CHUNK):
        sums = splat_f32(ZERO)
        for i in range(first, min(first + CHUNK, n), 16):
            sums = sums + exp(load_f32(x, at + i) - shift)
        total += hsum(sums)
    return np.float32(largest + np.log(total))


@kernel
def rank(x, at, n, token):
    """1 + the number of logits greater than x[token]. x: float32, n a multiple of 16."""
    limit, count = splat_f32(x[at + token]), 1
    for i in range(0, n, 16):
        count += count_above(load_f32(x, at + i), limit)
    return count


@kernel
def top(x, at, n, count, ids, values, to):
    """The `count` largest x[i], i < n, falling, the first of equals first: ids and values from `to` on.

    x: float32, n a multiple of 16; ids: int64; values: float32.
    """
    held = 0
    for first in range(0, n, 16):
        if held == count and count_above(load_f32(x, at + first), splat_f32(values[to + held - 1])) == 0:
            continue
        for i in range(first, first + 16):
            v = x[at + i]
            if held == count and v <= values[to + held - 1]:
                continue
            place = min(held, count - 1)
            held = min(held + 1, count)
            while place > 0 and values[to + place - 1] < v:
                values[to + place], ids[to + place] = values[to + place - 1], ids[to + place - 1]
                place -= 1
            values[to + place], ids[to + place] = v, i


@kernel
def uniform(seed, position):
    """A number in [0, 1) that depends on (seed, position) alone: two rounds of SplitMix64 (Steele et al. 2014)."""
    state = np.uint64(seed)
    for word in (np.uint64(0), np.uint64(position)):
        state = (state ^ word) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return np.float64(state >> np.uint64(11)) * (1.0 / (1 << 53))


# ---------------------------------------------------------------- random choice


@kernel
def _weigh(x, at, n, temperature, weights, to):
    """weights[i] = exp((x[i] - max x) / temperature), so the largest is 1; returns their sum."""
    shift, inverse = splat_f32(_largest(x, at, n)), splat_f32(ONE / temperature)
    total = np.float64(0)
    for first in range(0, n, CHUNK):
        sums = splat_f32(ZERO)
        for i in range(first, min(first + CHUNK, n), 16):
            w = exp((load_f32(x, at + i) - shift) * inverse)
            store_f32(weights, to + i, w)
            sums = sums + w
        total += hsum(sums)
    return total


@kernel
def _choose_from_all(weights, to, n, target):
    """The first index at which the running sum of all weights exceeds `target`."""
    last = 0
    for first in range(0, n, CHUNK):
        end = min(first + CHUNK, n)
        sums = splat_f32(ZERO)
        for i in range(first, end, 16):
            sums = sums + load_f32(weights, to + i)
        mass = np.float64(hsum(sums))
        if mass > target or end == n:
            for i in range(first, end):
                if weights[to + i] > ZERO:
                    last = i
                    target -= weights[to + i]
                    if target < 0:
                        return i
            return last
        target -= mass
    return last


@kernel
def _before(weights, to, i, j):
    """Whether token i comes before token j: by falling weight, then by rising index."""
    return weights[to + i] > weights[to + j] or (weights[to + i] == weights[to + j] and i < j)


@kernel
def _sift_down(heap, at, size, root, weights, to):
    while True:
        child = 2 * root + 1
        if child >= size:
            return
        if child + 1 < size and _before(weights, to, heap[at + child + 1], heap[at + child]):
            child += 1
        if _before(weights, to, heap[at + root], heap[at + child]):
            return
        heap[at + root], heap[at + child] = heap[at + child], heap[at + root]
        root = child


@kernel
def _gather(weights, to, n, floor, heap, at):
    """A heap, first token on top, of all tokens whose weight exceeds `floor`; returns its size."""
    size, limit = 0, splat_f32(floor)
    for first in range(0, n, 16):
        if count_above(load_f32(weights, to + first), limit) > 0:
            for i in range(first, first + 16):
                if weights[to + i] > floor:
                    heap[at + size] = i
                    size += 1
    for root in range(size // 2 - 1, -1, -1):
        _sift_down(heap, at, size, root, weights, to)
    return size


@kernel
def _take_best(heap, at, size, limit, mass_limit, weights, to):
    """Move tokens from the heap's top to its end, best first, until `limit` of them or `mass_limit` are taken.

    Returns (how many, their mass); token j of them is heap[at + size - 1 - j].
    """
    taken, mass = 0, np.float64(0)
    while taken < min(size, limit) and mass < mass_limit:
        last = size - 1 - taken
        heap[at], heap[at + last] = heap[at + last], heap[at]
        mass += weights[to + heap[at + last]]
        taken += 1
        _sift_down(heap, at, last, 0, weights, to)
    return taken, mass


@kernel
def _candidates(heap, n, total, limit, top_p, min_p, weights, to):
    """The best tokens: (heap size, how many taken, their mass), see _take_best. top_p counts here only if limit = n."""
    share = np.float64(top_p) if limit == n and top_p < ONE else np.float64(np.inf)
    if min_p > ZERO:
        size = _gather(weights, to, n, np.nextafter(min_p, ZERO), heap, to)
        mass = np.float64(0)
        for j in range(size):
            mass += weights[to + heap[to + j]]
        taken, mass = _take_best(heap, to, size, limit, mass * share, weights, to)
        return size, taken, mass
    # Few tokens carry nearly all the mass: look at those first, at all of them only where they don't do.
    floor = np.float32(1e-4)
    while True:
        size = _gather(weights, to, n, floor, heap, to)
        taken, mass = _take_best(heap, to, size, limit, total * share, weights, to)
        if taken == limit or mass >= total * share or floor == ZERO:
            return size, taken, mass
        floor = floor * np.float32(1e-4) if floor > np.float32(1e-30) else ZERO


@kernel
def sample(x, at, n, temperature, top_k, top_p, min_p, draw, weights, heap, to):
    """A token drawn from softmax(x / temperature) after three cuts, each on what the one before left.

    min_p: at least min_p times the best token's probability; top_k: the top_k best, 0 for all; top_p: the
    smallest set of best tokens with that much of the mass. x: float32, n a multiple of 16; temperature > 0;
    draw: in [0, 1), see `uniform`; weights: float32 and heap: int64, n numbers each from `to` on, overwritten.
    """
    total = _weigh(x, at, n, temperature, weights, to)
    if top_k == 0 and top_p >= ONE and min_p <= ZERO:
        return _choose_from_all(weights, to, n, draw * total)
    limit = min(top_k, n) if top_k > 0 else n
    size, taken, mass = _candidates(heap, n, total, limit, top_p, min_p, weights, to)
    if limit < n and top_p < ONE:
        kept, nucleus = 0, np.float64(0)
        while kept < taken and nucleus < mass * top_p:
            nucleus += weights[to + heap[to + size - 1 - kept]]
            kept += 1
        taken, mass = kept, nucleus
    target = draw * mass
    token = heap[to + size - 1]
    for j in range(taken):
        token = heap[to + size - 1 - j]
        target -= weights[to + token]
        if target < 0:
            break
    return token
