"""Choosing the next token from a row of logits.

A row has `n` logits in float32, padded to a multiple of 16 with -inf. All sums run in index order, so a row's
choice depends on its own logits, parameters and random number only.
"""

import numpy as np

from .jit import kernel
from .simd import count_above, exp, hmax, hsum, load_f32, load_word, splat_f32, store_f32, vmax

CHUNK = 1024
# A radix search over float32 from 0 to 1: their 30 bits that count, in three levels.
BITS, LEVELS = 10, 3
BINS = 1 << BITS

ZERO, ONE = np.float32(0), np.float32(1)
LOWEST = np.float32(-np.inf)


@kernel
def _largest(x, at, n):
    found = splat_f32(LOWEST)
    for i in range(0, n, 16):
        found = vmax(load_f32(x, at + i), found)
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
def _gather(weights, to, n, floor, ids):
    """ids, from `to` on: all tokens whose weight exceeds `floor`, by rising index; returns their number and mass."""
    size, mass, limit = 0, np.float64(0), splat_f32(floor)
    for first in range(0, n, 16):
        if count_above(load_f32(weights, to + first), limit) > 0:
            for i in range(first, first + 16):
                if weights[to + i] > floor:
                    ids[to + size] = i
                    mass += weights[to + i]
                    size += 1
    return size, mass


@kernel
def _fill_bins(weights, to, ids, size, level, prefix, bins, bins_at):
    """Number and mass of the weights that begin with the bits `prefix`, by their next BITS bits."""
    shift = BITS * (LEVELS - 1 - level)
    for b in range(bins_at, bins_at + 2 * BINS):
        bins[b] = 0
    for j in range(size):
        at = to + ids[to + j]
        bits = np.int64(load_word(weights, at)) >> shift
        if bits >> BITS == prefix:
            b = bins_at + 2 * (bits & (BINS - 1))
            bins[b] += 1
            bins[b + 1] += weights[at]


@kernel
def _cut(weights, to, ids, size, most, mass_limit, bins, bins_at):
    """Where the smallest set of best tokens ends that has `most` tokens or `mass_limit` of mass.

    Returns (threshold, ties, mass): the set is all tokens of ids above the threshold, and the first `ties` of those
    at it; all of them where they are too few. Weights in (0, 1] sort like their bits: a radix search.
    """
    prefix, count, mass = np.int64(0), np.int64(0), np.float64(0)
    inside, more = np.float64(0), np.float64(0)
    for level in range(LEVELS):
        _fill_bins(weights, to, ids, size, level, prefix, bins, bins_at)
        chosen, reached = -1, False
        for b in range(BINS - 1, -1, -1):
            if bins[bins_at + 2 * b] > 0 and not reached:
                if chosen >= 0:
                    count, mass = count + np.int64(inside), mass + more
                chosen, inside, more = b, bins[bins_at + 2 * b], bins[bins_at + 2 * b + 1]
                reached = count + inside >= most or mass + more >= mass_limit
        if level == 0 and not reached:
            return ZERO, 0, mass + more
        prefix = (prefix << BITS) + chosen
    weight = more / inside
    ties = max(1, np.int64(min(inside, np.float64(most - count), np.ceil((mass_limit - mass) / weight))))
    return np.float32(weight), ties, mass + ties * weight


@kernel
def _choose_above(weights, to, ids, size, threshold, ties, target):
    """The first token of those that `_cut` left at which their running sum exceeds `target`, else the last of them."""
    last = ids[to]
    for j in range(size):
        weight = weights[to + ids[to + j]]
        if weight > threshold or (weight == threshold and ties > 0):
            ties -= weight == threshold
            last = ids[to + j]
            target -= weight
            if target < 0:
                return last
    return last


@kernel
def _candidates(weights, to, n, total, limit, top_p, min_p, ids):
    """ids: tokens among which all are that the cuts can leave; returns their number and mass."""
    if min_p > ZERO:
        return _gather(weights, to, n, np.nextafter(min_p, ZERO), ids)
    # Few tokens carry nearly all the mass: look at those first, at all of them only where they don't do.
    floor = np.float32(1e-4)
    while True:
        size, mass = _gather(weights, to, n, floor, ids)
        if (limit < n and size >= limit) or (limit == n and mass >= total * top_p) or floor == ZERO:
            return size, mass
        floor = floor * np.float32(1e-4) if floor > np.float32(1e-30) else ZERO


@kernel
def sample(x, at, n, temperature, top_k, top_p, min_p, draw, weights, ids, to, bins, bins_at):
    """A token drawn from softmax(x / temperature) after three cuts, each on what the one before left.

    min_p: at least min_p times the best token's probability; top_k: the top_k best, 0 for all; top_p: the
    smallest set of best tokens with that much of the mass. x: float32, n a multiple of 16; temperature > 0;
    draw: in [0, 1), see `uniform`: the running sum over what is left, by rising index, passes it at the token.
    weights: float32 and ids: int64, n numbers each from `to` on, and bins: float64, 2 * BINS from bins_at on, are
    overwritten.
    """
    total = _weigh(x, at, n, temperature, weights, to)
    if top_k == 0 and top_p >= ONE and min_p <= ZERO:
        return _choose_from_all(weights, to, n, draw * total)
    limit, everything = min(top_k, n) if top_k > 0 else n, np.float64(np.inf)
    size, mass = _candidates(weights, to, n, total, limit, top_p, min_p, ids)
    threshold, ties = ZERO, 0
    if limit < size:
        threshold, ties, mass = _cut(weights, to, ids, size, limit, everything, bins, bins_at)
    elif min_p <= ZERO and limit == n:
        mass = total
    if top_p < ONE:
        threshold, ties, mass = _cut(weights, to, ids, size, limit, mass * top_p, bins, bins_at)
    return _choose_above(weights, to, ids, size, threshold, ties, draw * mass)
