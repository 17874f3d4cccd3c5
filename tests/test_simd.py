"""SIMD values by themselves: conversions, reductions, exp, the byte dot product. Run on every CPU family by test_families."""

import re

import numpy as np
import pytest

from minilora_kernels import reference
from minilora_kernels.convert import widen_float16
from minilora_kernels.dot import (
    begin_short,
    dot2,
    dot2_bf16,
    dot4_bytes,
    dot4_short,
    dot4_small,
    end_short,
    start_bytes,
    start_unsigned,
    start_wide,
    wide_first_signed,
    wide_first_unsigned,
    wide_second_signed,
    wide_second_unsigned,
)
from minilora_kernels.floats import narrow_bfloat16, widen_bfloat16
from minilora_kernels.jit import inlined, kernel, program
from minilora_kernels.simd import (
    add_high,
    bit_pairs,
    even_bf16,
    exp,
    f32x16,
    fma,
    i32x16,
    inverse,
    magnitude,
    odd_bf16,
    repeat2,
    repeat4,
    round_i32,
    splat_f32,
    splat_i32,
    tile,
    times,
    to_f32,
    vmax,
    vmax_i32,
    vmin,
)
from minilora_kernels.simd_lanes import count_above, hmax, hmax4_i32, hmax_i32, hsum, hsum4_i32, keep_lanes, lane
from minilora_kernels.simd_memory import (
    compiler_barrier,
    load_f16,
    load_f32,
    load_i16,
    load_i16_of_i8,
    load_i32,
    load_scalar_f16,
    load_u8,
    load_word,
    store_f16,
    store_f32,
    store_i8,
    store_i32,
)
from minilora_kernels.wide import LARGEST, SECOND, SECOND_SUM, join_sums

ALL_HALVES = np.arange(1 << 16, dtype=np.uint16)

_times8 = times[8]


@kernel
def _widen(x, out):
    for i in range(0, len(x), 16):
        store_f32(out, i, load_f16(x, i))


@kernel
def _widen_scalars(x, out):
    for i in range(len(x)):
        out[i] = load_scalar_f16(x, i)


@kernel
def _widen_bf16(x, out):
    for i in range(0, len(x) // 2, 16):
        pairs = load_i16(x, 2 * i)
        store_f32(out, i, even_bf16(pairs))
        store_f32(out, len(x) // 2 + i, odd_bf16(pairs))


@kernel
def _dot2_bf16(acc, a, b):
    for i in range(0, len(acc), 16):
        store_f32(acc, i, dot2_bf16(load_f32(acc, i), load_i16(a, 2 * i), load_i16(b, 2 * i)))


@kernel
def _narrow(x, out):
    for i in range(0, len(x), 16):
        store_f16(out, i, load_f32(x, i))


@kernel
def _exp(x, out):
    for i in range(0, len(x), 16):
        store_f32(out, i, exp(load_f32(x, i)))


@kernel
def _byte_dots(minus_sums, u, s, signed, unsigned):
    for i in range(0, len(minus_sums), 16):
        minus, some, others = load_i32(minus_sums, i), load_u8(u, 4 * i), load_u8(s, 4 * i)
        store_f32(signed, i, to_f32(dot4_bytes(start_bytes(minus), some, others)))
        store_f32(unsigned, i, to_f32(dot4_bytes(start_unsigned(minus), some, others)))


@kernel
def _nibble_dots(acc, u, s, out):
    """Eight steps, of 32 columns, for each 16 sums."""
    for i in range(0, len(acc), 16):
        start = load_i32(acc, i)
        short = begin_short(start)
        for k in range(8):
            at = 4 * (8 * i + 16 * k)
            short = dot4_short(short, load_u8(u, at), load_u8(s, at))
        store_f32(out, i, to_f32(end_short(start, short)))


_two_sums = tile(i32x16, 2)


@kernel
def _wide_dots(words, minus, others, unsigned, signed):
    """16 lanes, each of 16 bytes times the same 16 wide integers."""
    u, s = _two_sums(), _two_sums()
    for i in range(2):
        u[i], s[i] = splat_i32(np.int32(0)), splat_i32(np.int32(0))
    for w in range(4):
        both, first, second = (
            load_u8(others, 64 * w),
            repeat4(load_word(words, w)),
            repeat4(load_word(words, w + SECOND)),
        )
        u[0], s[0] = wide_first_unsigned(u[0], both, first), wide_first_signed(s[0], both, first)
        u[SECOND_SUM] = wide_second_unsigned(u[SECOND_SUM], both, second)
        s[SECOND_SUM] = wide_second_signed(s[SECOND_SUM], both, second)
    store_i32(unsigned, 0, join_sums(u[0], u[SECOND_SUM]) + start_wide(splat_i32(minus)))
    store_i32(signed, 0, join_sums(s[0], s[SECOND_SUM]))


@kernel
def _odds_and_ends(x, out, small):
    v = load_f32(x, 0)
    out[0], out[1], out[2] = hsum(v), hmax(v), count_above(v, load_f32(x, 16))
    store_f32(out, 16, keep_lanes(v, 3, 9, np.float32(-7)))
    store_f32(out, 32, fma(v, v, load_f32(x, 16)))
    store_i8(small, 0, round_i32(v))
    store_f32(out, 48, to_f32(_times8(round_i32(v))))


@kernel
def _largest_magnitude(x):
    return hmax_i32(vmax_i32(magnitude(load_f32(x, 0)), magnitude(load_f32(x, 16))))


@kernel
def _larger_and_smaller(x, out):
    store_f32(out, 0, vmax(load_f32(x, 0), load_f32(x, 16)))
    store_f32(out, 16, vmin(load_f32(x, 0), load_f32(x, 16)))


@kernel
def _four_at_once(x, out):
    """Of four vectors the largest lanes and the sums; then lane 5 of the first everywhere."""
    a, b, c, d = load_i32(x, 0), load_i32(x, 16), load_i32(x, 32), load_i32(x, 48)
    store_i32(out, 0, hmax4_i32(a, b, c, d))
    store_i32(out, 16, hsum4_i32(a, b, c, d))
    store_i32(out, 32, lane(a, 5))


@kernel
def _inverse(x, out):
    store_f32(out, 0, inverse(load_f32(x, 0)))


@kernel
def _pairs(acc, a, b, out):
    """32 bytes as they are times the same pair of int16."""
    store_i32(out, 0, dot2(load_i32(acc, 0), load_i16_of_i8(a, 0), repeat2(load_word(b, 0))))


_four = tile(f32x16, 4)


@inlined
def _towers(rows, x, out, at):
    """Too long for LLVM to make it part of its callers by itself."""
    v, o = _four(), splat_f32(np.float32(0))
    for r in range(rows):
        v[r] = load_f32(x, at + 16 * r)
        v[r] = exp(o - exp(o - exp(o - exp(o - exp(o - exp(o - v[r]))))))
        v[r] = exp(o - exp(o - exp(o - exp(o - exp(o - exp(o - v[r]))))))
        v[r] = exp(o - exp(o - exp(o - exp(o - exp(o - exp(o - v[r]))))))
    for r in range(rows):
        store_f32(out, at + 16 * r, v[r])


@kernel
def _both_sizes(x, out):
    _towers(4, x, out, 0)
    _towers(2, x, out, 64)


def test_an_inlined_kernel_is_part_of_its_caller_at_every_size():
    compiled, out = program(_both_sizes), np.zeros(112, np.float32)
    # Code that comes from the disk can't be read.
    compiled._cache.disable()
    compiled(np.full(112, np.inf, np.float32), out)
    assert len(set(out[:96])) == 1 and abs(out[0] - np.exp(-out[0])) < 1e-3 and np.all(out[96:] == 0)
    [code] = compiled.inspect_llvm().values()
    assert not [line for line in code.splitlines() if "_towers" in line and ("define" in line or "call" in line)]


@kernel
def _three_stores(x):
    x[0] = 3
    x[0] = 5
    compiler_barrier()
    x[0] = 7


def test_a_compiler_barrier_stays_where_it_is():
    """A store that nobody can see is gone, but not that before the barrier."""
    compiled, x = program(_three_stores), np.zeros(1, np.int64)
    compiled._cache.disable()
    compiled(x)
    [code] = compiled.inspect_llvm().values()
    stored = [int(number) for number in re.findall(r"store i64 (\d+), ", code)]
    assert [number for number in stored if number in (3, 5, 7)] == [5, 7] and x[0] == 7


def all_halves_as_float32():
    """What NumPy makes of them; on ARM it warns of signalling NaN."""
    with np.errstate(invalid="ignore"):
        return ALL_HALVES.view(np.float16).astype(np.float32)


def test_every_float16_widens_exactly():
    expected = all_halves_as_float32()
    for convert in (_widen, _widen_scalars):
        out = np.zeros(1 << 16, np.float32)
        program(convert)(ALL_HALVES, out)
        assert np.array_equal(out, expected, equal_nan=True)


def test_float16_that_fills_no_vector_widens_too():
    x = ALL_HALVES[:999].reshape(27, 37)
    assert np.array_equal(widen_float16(x), x.view(np.float16).astype(np.float32))


def test_every_bfloat16_widens_exactly():
    out = np.zeros(1 << 16, np.float32)
    program(_widen_bf16)(ALL_HALVES, out)
    halves = np.concatenate([ALL_HALVES[::2], ALL_HALVES[1::2]])
    assert np.array_equal(out, (halves.astype(np.uint32) << 16).view(np.float32), equal_nan=True)


def test_products_of_bfloat16_add_up_in_the_order_of_avx512():
    """The odd one first, each sum rounded once: products of bfloat16 are exact in float32, their sums in float64."""
    rng = np.random.default_rng(4)
    acc = rng.standard_normal(1600, np.float32)
    a, b = (narrow_bfloat16(rng.standard_normal(3200, np.float32)) for _ in range(2))
    products = widen_bfloat16(a).astype(np.float64) * widen_bfloat16(b)
    expected = ((acc + products[1::2]).astype(np.float32) + products[::2]).astype(np.float32)
    assert (expected != ((acc + products[::2]).astype(np.float32) + products[1::2]).astype(np.float32)).any()
    program(_dot2_bf16)(acc, a.view(np.int16), b.view(np.int16))
    assert np.array_equal(acc, expected)


def test_bfloat16_is_rounded_to_even_and_nan_stays():
    raw = np.array([0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F818000, 0x7F800001, 0xFFFFFFFF], np.uint32)
    found = narrow_bfloat16(raw.view(np.float32))
    assert found[:4].tolist() == [0x3F80, 0x3F80, 0x3F81, 0x3F82] and np.isnan(widen_bfloat16(found)[4:]).all()


def test_narrowing_rounds_like_numpy_and_never_overflows():
    rng = np.random.default_rng(0)
    exact = all_halves_as_float32()
    exact = exact[np.isfinite(exact)]
    between = (exact[:-1] + exact[1:]) / 2
    x = np.concatenate(
        [
            exact,
            between,
            np.nextafter(between, np.float32(9)),
            rng.standard_normal(4096, np.float32) * 10,
            rng.standard_normal(4096, np.float32) * 1e-7,
        ]
    )
    x = x[: len(x) // 16 * 16].astype(np.float32)
    out = np.zeros(len(x), np.uint16)
    program(_narrow)(x, out)
    assert np.array_equal(out.view(np.float16), np.clip(x, -65504, 65504).astype(np.float16))
    big = np.array([1e6, -1e6, np.inf, -np.inf, np.nan, -np.nan, 1, 2] * 2, np.float32)
    out = np.zeros(16, np.uint16)
    program(_narrow)(big, out)
    assert out.view(np.float16)[:4].tolist() == [65504, -65504, 65504, -65504]
    assert np.isnan(out.view(np.float16)[4:6]).all()


def test_exp():
    x = np.concatenate([np.linspace(-86.9, 88, 4096), [0, -0.0, -100, -np.inf, 87.99, 1, -1, 0.5] * 2]).astype(
        np.float32
    )
    out = np.zeros(len(x), np.float32)
    program(_exp)(x, out)
    program(_exp)(np.full(16, np.nan, np.float32), nothing := np.zeros(16, np.float32))
    assert np.isnan(nothing).all()
    expected = np.where(x < -87, 0, np.exp(x.astype(np.float64)))
    assert np.abs(out - expected).max() <= 3e-7 * expected.max() and (np.abs(out - expected) <= 3e-7 * expected).all()


def test_sums_of_nibbles_are_exact_for_32_columns():
    rng = np.random.default_rng(3)
    u, s = rng.integers(0, 16, (64, 8, 16, 4)), rng.integers(-128, 128, (64, 8, 16, 4))
    u[:2], s[0], s[1] = 15, -128, 127
    acc, out = rng.integers(-100000, 100000, (64, 16)), np.zeros(64 * 16, np.float32)
    program(_nibble_dots)(
        acc.astype(np.int32).reshape(-1), u.astype(np.uint8).reshape(-1), s.astype(np.int8).reshape(-1), out
    )
    assert np.array_equal(out.reshape(64, 16), acc + (u * s).sum(axis=(1, 3)))


def _unpacks(unpack, width):
    @kernel
    def unpacks(low, high, out):
        for first in range(8 - width + 1):
            # What follows reads bytes: the dot product with ones of every fourth is the byte itself.
            for j in range(4):
                alone = repeat4(np.int32(1 << 8 * j))
                u = unpack(load_u8(low, 0), load_u8(high, 0), first)
                store_f32(out, 64 * first + 16 * j, to_f32(dot4_small(splat_i32(np.int32(0)), u, alone)))

    return unpacks


@inlined
def _pairs_of_the_second(low, high, first):
    return bit_pairs(high, first)


@pytest.mark.parametrize(
    ("unpack", "width", "times"), [(add_high[1], 1, 16), (add_high[2], 2, 16), (_pairs_of_the_second, 2, 1)]
)
def test_bits_anywhere_in_a_byte(unpack, width, times):
    """Above nibbles, or by themselves."""
    rng = np.random.default_rng(6)
    low, high = rng.integers(0, 16, 64, np.uint8), rng.integers(0, 256, 64, np.uint8)
    out = np.zeros(64 * (8 - width + 1), np.float32)
    program(_unpacks(unpack, width), (width, times))(low, high, out)
    found = out.reshape(-1, 4, 16).swapaxes(1, 2).reshape(-1, 64)
    under = low if times > 1 else 0
    expected = [under + times * (high >> first & (1 << width) - 1) for first in range(8 - width + 1)]
    assert np.array_equal(found, expected)


def test_dot4_bytes_is_exact():
    rng = np.random.default_rng(3)
    u = np.concatenate([rng.integers(0, 256, 4096), np.zeros(64), np.full(64, 255)]).astype(np.uint8)
    s = np.concatenate([rng.integers(-127, 128, 4096), np.full(64, -127), np.full(64, 127)]).astype(np.int8)
    nothing = np.zeros(len(u) // 4, np.int32)
    sums, dots = reference.dot4(nothing, np.ones_like(u), s), reference.dot4(nothing, u, s)
    signed, unsigned = np.zeros(len(sums), np.float32), np.zeros(len(sums), np.float32)
    program(_byte_dots)(-sums, u, s.view(np.uint8), signed, unsigned)
    assert np.array_equal(signed, dots - 128 * sums)
    assert np.array_equal(unsigned, dots)


def test_products_of_bytes_with_wide_integers_are_exact():
    rng, largest = np.random.default_rng(4), int(LARGEST)
    for v in (*rng.integers(-largest, largest + 1, (20, 16)), np.full(16, largest), np.full(16, -largest)):
        others = rng.integers(0, 256, (4, 16, 4), np.uint8)
        others[:, :2], others[:, 2:4] = 0, 255
        for wide in (v, abs(v)):
            unsigned, signed = np.zeros(16, np.int32), np.zeros(16, np.int32)
            words = reference.wide_words(wide[None].astype(np.int32))[0]
            assert np.array_equal(reference.wide_integers(words[None])[0], wide)
            program(_wide_dots)(words, np.int32(-wide.sum()), others.reshape(-1), unsigned, signed)
            fours = wide.reshape(4, 1, 4)
            assert np.array_equal(unsigned, ((others.astype(np.int64) - 128) * fours).sum(axis=(0, 2)))
        # Weights are never negative.
        assert np.array_equal(signed, (others.view(np.int8).astype(np.int64) * fours).sum(axis=(0, 2)))


def test_odds_and_ends():
    rng = np.random.default_rng(1)
    x = np.round(rng.standard_normal(32) * 20 + 0.25).astype(np.float32) + np.float32(0.5)
    out, small = np.zeros(64, np.float32), np.zeros(16, np.int8)
    program(_odds_and_ends)(x, out, small)
    v = x[:16]
    assert out[0] == v.sum() and out[1] == v.max() and out[2] == (v > x[16:]).sum()
    assert np.array_equal(out[16:32], np.where((np.arange(16) >= 3) & (np.arange(16) < 9), v, -7))
    assert np.allclose(out[32:48], v * v + x[16:], rtol=1e-6)
    assert np.array_equal(small, np.rint(v).astype(np.int8)) and np.array_equal(out[48:], np.rint(v) * 8)


def test_four_vectors_are_folded_at_once():
    x, out = np.random.default_rng(2).integers(-(2**20), 2**20, 64).astype(np.int32), np.zeros(48, np.int32)
    program(_four_at_once)(x, out)
    four = x.reshape(4, 16)
    assert np.array_equal(out[:16], np.tile(four.max(axis=1), 4))
    assert np.array_equal(out[16:32], np.tile(four.sum(axis=1), 4)) and (out[32:] == x[5]).all()


def test_the_inverse_of_what_is_not_positive_is_nothing():
    """So is that of what is so small that it would be infinite."""
    numbers = [4, 0, -0.0, -3, np.nan, -np.nan, np.inf, 1e30, 2.0**-126, 2.0**-127, 2.0**-129]
    x, out = np.array([*numbers, *[1] * 5], np.float32), np.ones(16, np.float32)
    program(_inverse)(x, out)
    assert out[:11].tolist() == [0.25, 0, 0, 0, 0, 0, 0, np.float32(1) / np.float32(1e30), 2.0**126, 0, 0]


@pytest.mark.parametrize("pair", [(32512, -32512), (-32768, -32768), (3, 32767)])
def test_products_of_pairs_are_exact(pair):
    rng, b, out = np.random.default_rng(3), np.array(pair, np.int16), np.zeros(16, np.int32)
    a, acc = rng.integers(-128, 128, 32).astype(np.int8), rng.integers(-(2**30), 2**30, 16).astype(np.int32)
    a[:4] = -128, -128, 127, 127
    program(_pairs)(acc, a, b, out)
    assert np.array_equal(out, acc + (a.reshape(16, 2).astype(np.int64) * b).sum(axis=1))


def test_magnitudes_are_in_the_order_of_numbers_and_nan_is_above_all():
    x = np.linspace(-3, 2, 32, dtype=np.float32)
    found = program(_largest_magnitude)
    assert np.int32(found(x)).view(np.float32) == 3
    for place, value in ((5, np.inf), (20, np.nan)):
        x[place] = value
        assert np.array_equal(np.int32(found(x)).view(np.float32), np.float32(value), equal_nan=True)


def test_of_two_numbers_the_second_stays_beside_nan():
    x, out = np.arange(32, dtype=np.float32), np.zeros(32, np.float32)
    x[3], x[4], x[21] = np.nan, 99, np.nan
    program(_larger_and_smaller)(x, out)
    assert out[:3].tolist() == [16, 17, 18] and out[16:19].tolist() == [0, 1, 2]
    assert out[3] == out[19] == 19 and (out[4], out[20]) == (99, 20) and np.isnan(out[[5, 21]]).all()
