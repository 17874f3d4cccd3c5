"""Choosing the next token from a row of logits.

A row has `n` logits in float32, padded to a multiple of 16 with -inf. All sums run in a fixed order, so a row's choice
depends on its own logits, parameters and random number only. top_p: nucleus sampling, Holtzman et al. 2019,
arXiv:1904.09751; min_p: Nguyen et al. 2024, arXiv:2407.01082.
"""

import numpy as np
from numba import types
from numba.core.typing import signature

from .jit import kernel
from .kinds import FLOATS, INTEGERS, NUMBER
from .simd import exp, magnitude, number_of, only_above, splat_f32, splat_i32, vmax, vmax_i32
from .simd_lanes import count_above, hmax, hmax_i32, hsum
from .simd_memory import load_f32, store_f32
from .unit import unit

CHUNK = 1024
# Weights are in [0, 1]; such numbers are in the order of their bits.
BITS_OF_ONE = np.int32(0x3F800000)
# From more tokens than this on, a pass over all of them pays.
MANY = 2048

ZERO, ONE = np.float32(0), np.float32(1)
LOWEST = np.float32(-np.inf)


@kernel
def _largest(x, at, n):
    """The largest of n numbers; NaN if one of them is NaN."""
    found, sizes = splat_f32(LOWEST), splat_i32(np.int32(0))
    for i in range(0, n, 16):
        v = load_f32(x, at + i)
        found, sizes = vmax(v, found), vmax_i32(magnitude(v), sizes)
    size = number_of(hmax_i32(sizes))
    return size if np.isnan(size) else hmax(found)


@kernel
def _before(x, y):
    """Whether x beats y in a choice of the best: it is larger, or NaN where y is not."""
    return not np.isnan(y) and not x <= y


@kernel
def argmax(x, at, n):
    """The index i < n of the largest x[i], the first of equals; of the first NaN if there is one, as in NumPy.

    x: float32, n a multiple of 16.
    """
    best, chunk = LOWEST, 0
    for first in range(0, n, CHUNK):
        here = _largest(x, at + first, min(CHUNK, n - first))
        if _before(here, best):
            best, chunk = here, first
    for i in range(chunk, min(chunk + CHUNK, n)):
        if not _before(best, x[at + i]):
            return i
    return 0


@kernel
def log_sum_exp(x, at, n):
    """log(sum over i < n of exp(x[i])); NaN where one is NaN or infinity, or all are -infinity.

    x: float32, n a multiple of 16.
    """
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
    """The `count` largest x[i], i < n, in falling order, the first of equals first: ids and values from `to` on.

    x: float32, n a multiple of 16, none of them NaN; ids: int64; values: float32; count: 1 or more.
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
    """A number in [0, 1) that depends on (seed, position) alone: two rounds of SplitMix64.

    Steele et al. 2014, doi:10.1145/2660193.2660195.
    """
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
def _above(weights, to, n, floor):
    """(number, mass) of the weights that exceed `floor`; n is a multiple of 16."""
    limit, count, mass = splat_f32(floor), 0, np.float64(0)
    for first in range(0, n, CHUNK):
        sums = splat_f32(ZERO)
        for i in range(first, min(first + CHUNK, n), 16):
            w = load_f32(weights, to + i)
            count += count_above(w, limit)
            sums = sums + only_above(w, limit)
        mass += hsum(sums)
    return count, mass


@kernel
def _gather(weights, to, n, floor, ids):
    """Move the weights that exceed `floor` to the front, by rising index, zeros after them to a multiple of 16.

    ids: int64, their tokens from `to` on. Returns their number rounded up to a multiple of 16.
    """
    size, limit = 0, splat_f32(floor)
    for first in range(0, n, 16):
        if count_above(load_f32(weights, to + first), limit) > 0:
            for i in range(first, first + 16):
                if weights[to + i] > floor:
                    ids[to + size], weights[to + size] = i, weights[to + i]
                    size += 1
    while size % 16 > 0:
        ids[to + size], weights[to + size] = 0, ZERO
        size += 1
    return size


@kernel
def _cut(weights, to, size, most, mass_limit):
    """Where the smallest set of best tokens that has `most` tokens or `mass_limit` of mass ends.

    Returns (threshold, ties, mass): the set is all weights above the threshold and the first `ties` of those equal to
    it; all weights if they are too few. The threshold is found by bisection of its bits.
    """
    many, mass = _above(weights, to, size, ZERO)
    if many < most and mass < mass_limit:
        return ZERO, 0, mass
    # Bits of two numbers: above the one are enough weights (`many`), above the other too few (`few`, of mass `mass`).
    enough, too_few, few, mass = np.int32(0), BITS_OF_ONE, 0, np.float64(0)
    while too_few - enough > 1:
        middle = np.int32((enough + too_few) // 2)
        found, held = _above(weights, to, size, number_of(middle))
        if found >= most or held >= mass_limit:
            enough, many = middle, found
        else:
            too_few, few, mass = middle, found, held
    threshold = number_of(too_few)
    wanted = min(np.float64(most - few), np.ceil((mass_limit - mass) / threshold))
    ties = max(1, np.int64(min(np.float64(many - few), wanted)))
    return threshold, ties, mass + ties * np.float64(threshold)


@kernel
def _choose_above(weights, to, ids, size, threshold, ties, target):
    """The first of the tokens left by `_cut` at which their running sum exceeds `target`, else the last of them."""
    last = ids[to]
    # Vectors without a weight at the threshold or above it are skipped.
    limit = splat_f32(np.nextafter(threshold, ZERO) if ties > 0 else threshold)
    for first in range(to, to + size, 16):
        if count_above(load_f32(weights, first), limit) > 0:
            for j in range(first, first + 16):
                weight = weights[j]
                if weight > threshold or (weight == threshold and ties > 0):
                    ties -= weight == threshold
                    last = ids[j]
                    target -= weight
                    if target < 0:
                        return last
    return last


@kernel
def _raised(weights, to, n, floor, limit):
    """A higher floor that still has `limit` weights above it, and if there is such a one hardly more than MANY."""
    ceiling, count, fewer = ONE, MANY + 1, 0
    while count > MANY and fewer <= MANY:
        middle = np.float32(0.5) * (floor + ceiling)
        if middle <= floor or middle >= ceiling:
            return floor
        found, _ = _above(weights, to, n, middle)
        if found >= limit:
            floor, count = middle, found
        else:
            ceiling, fewer = middle, found
    return floor


@kernel
def _floor_of(weights, to, n, total, limit, top_p, min_p):
    """A number such that the weights above it include all that the cuts can leave, and not many more."""
    if min_p > ZERO:
        return np.nextafter(min_p, ZERO)
    # Few tokens carry nearly all the mass: those are tried first, more only where they do not suffice.
    tokens, share = (limit, np.float64(np.inf)) if limit < n else (n + 1, total * top_p)
    floor = np.float32(1e-2)
    count, mass = _above(weights, to, n, floor)
    while count < tokens and mass < share and floor > ZERO:
        floor = floor * np.float32(1e-2) if floor > np.float32(1e-30) else ZERO
        count, mass = _above(weights, to, n, floor)
    return _raised(weights, to, n, floor, limit) if count > MANY and limit < n else floor


@kernel
def _first_that_is_no_number(x, at, n):
    for i in range(n):
        if not x[at + i] < np.inf:
            return i
    return 0


_SAMPLE = signature(
    NUMBER,
    *(FLOATS, NUMBER, NUMBER),
    *(types.float32, NUMBER, types.float32, types.float32, types.float64),
    *(FLOATS, INTEGERS, NUMBER),
)


@kernel
def sample(x, at, n, temperature, top_k, top_p, min_p, draw, weights, ids, to):
    """A token drawn from softmax(x / temperature) after three cuts, each of what the one before left.

    min_p: at least min_p times the best token's probability; top_k: the top_k best, 0 for all; top_p: the
    smallest set of best tokens with that much of the mass. x: float32, n a multiple of 16; temperature: at least
    float32's smallest normal number; draw: in [0, 1), see `uniform`: the token is the first, by rising index, at which
    the running share of what is left exceeds it. Where a logit is NaN or infinity, or all are -infinity, the first such
    token: there is nothing to choose by. weights: float32 and ids: int64, n numbers each from `to` on, are overwritten.
    """
    total = _weigh(x, at, n, temperature, weights, to)
    if not total < np.inf:
        return _first_that_is_no_number(x, at, n)
    if top_k == 0 and top_p >= ONE and min_p <= ZERO:
        return _choose_from_all(weights, to, n, draw * total)
    limit, everything = min(top_k, n) if top_k > 0 else n, np.float64(np.inf)
    size = _gather(weights, to, n, _floor_of(weights, to, n, total, limit, top_p, min_p), ids)
    threshold, ties, mass = ZERO, 0, total
    if limit < n or min_p > ZERO:
        threshold, ties, mass = _cut(weights, to, size, limit, everything)
    if top_p < ONE:
        threshold, ties, mass = _cut(weights, to, size, limit, mass * top_p)
    return _choose_above(weights, to, ids, size, threshold, ties, draw * mass)


@unit(lambda: (_SAMPLE,))
def make_sample():
    """`sample`, for its unit."""
    return sample
