"""Softmax of one split, in place; and how splits are merged, in order, by their maxima and sums."""

import numpy as np

from .jit import kernel
from .prefetching import prefetch_share
from .simd import exp, fma, magnitude, number_of, splat_f32, splat_i32, vmax, vmax_i32
from .simd_lanes import first_lane, hmax, hmax_i32, hsum, keep_lanes
from .simd_memory import load_f32, store_f32

ZERO, ONE, NOTHING = np.float32(0), np.float32(1), np.int32(0)
LOWEST = np.float32(-np.inf)


@kernel
def mask_row(scratch, at, first, end, start, stop):
    """The largest score of lanes first .. end, -inf where there are none. The others of start .. stop become -inf.

    start and stop are multiples of 16, lanes are counted from `at`.
    """
    largest = splat_f32(LOWEST)
    for t in range(start, stop, 16):
        scores = load_f32(scratch, at + t)
        if t < first or t + 16 > end:
            scores = keep_lanes(scores, first - t, end - t, LOWEST)
            store_f32(scratch, at + t, scores)
        largest = vmax(scores, largest)
    return hmax(largest)


def make_weigh_row(scaled: bool):
    """A kernel that turns scores into weights, or into weights times scales."""

    @kernel
    def weigh_row(scratch, at, start, stop, maximum, scales, prefetch):
        """Scores of lanes start .. stop, multiples of 16, become weights exp(score - maximum).

        If `scaled`, each is then multiplied by the scale at `scales` + lane. Meanwhile it runs `prefetch`.

        Returns (sum of the weights, if `scaled` the largest of what they became, else 0); NaN where one of them is NaN.
        """
        total, largest = splat_f32(ZERO), splat_i32(NOTHING)
        # If all scores are -inf, all weights are 0: -inf minus -inf would be NaN.
        shift = splat_f32(maximum if maximum > LOWEST else ZERO)
        for t in range(start, stop, 16):
            weight = exp(load_f32(scratch, at + t) - shift)
            total = total + weight
            if scaled:
                weight = weight * load_f32(scratch, scales + t)
                largest = vmax_i32(magnitude(weight), largest)
            store_f32(scratch, at + t, weight)
            prefetch_share(prefetch, t - start)
        return hsum(total), number_of(hmax_i32(largest))

    return weigh_row


@kernel
def merge_row(sums, at, size, maximum, total, more, more_at, more_maximum, more_total):
    """Merge a later split into (sums, maximum, total); returns the new maximum and total.

    sums: float32, `size` numbers at `at`; more, more_at: the later split's; *maximum, *total: of the
    scores, and of the weights relative to that maximum. A total of 0 is a split of which nothing was seen.
    """
    if more_total == ZERO:
        return maximum, total
    if total == ZERO:
        for d in range(0, size, 16):
            store_f32(sums, at + d, load_f32(more, more_at + d))
        return more_maximum, more_total
    # exp(maximum - the larger one): 1 for that one itself.
    keep, take = splat_f32(ONE), exp(splat_f32(-abs(maximum - more_maximum)))
    larger = maximum
    if not maximum >= more_maximum:
        keep, take, larger = take, keep, more_maximum
    for d in range(0, size, 16):
        store_f32(sums, at + d, fma(load_f32(more, more_at + d), take, load_f32(sums, at + d) * keep))
    return larger, first_lane(fma(splat_f32(more_total), take, splat_f32(total) * keep))


@kernel
def divide_row(sums, at, size, total, out, out_at):
    """out = sums / total."""
    inverse = splat_f32(ONE / total)
    for d in range(0, size, 16):
        store_f32(out, out_at + d, load_f32(sums, at + d) * inverse)
