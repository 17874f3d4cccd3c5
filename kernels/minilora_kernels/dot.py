"""Dot products, with one lowering per CPU family. All integer weights go through that of bytes:

    dot4(acc, u, s)[i] = acc[i] + sum over j < 4 of u[4 i + j] * s[4 i + j]

u is unsigned, s signed; sums are int32, and exact where they fit. int8 weights are stored as u = 128 + weight;
`dot4_bytes` multiplies them in the way that suits the CPU, and nibbles have sums of their own. Products of bytes with
wide integers, see `wide`, and of bfloat16 are here too.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from llvmlite import binding, ir

from . import cpu
from .simd import (
    Vector,
    call,
    constant,
    f32x16,
    i16x32,
    i32x16,
    join,
    multiply_add,
    pick_lanes,
    primitive,
    u8x64,
    widen_even,
    widen_odd,
)

_I32 = i32x16.llvm


def _split(builder, v, parts):
    step = v.type.count // parts
    return [pick_lanes(builder, v, range(i * step, (i + 1) * step)) for i in range(parts)]


def _by_parts(builder, parts, emit, *vectors):
    """emit on each of 1, 2 or 4 equal parts, the results joined."""
    done = [emit(builder, *args) for args in zip(*(_split(builder, v, parts) for v in vectors), strict=True)]
    while len(done) > 1:
        done = [join(builder, done[i], done[i + 1]) for i in range(0, len(done), 2)]
    return done[0]


@cache
def _vnni_takes_parts() -> bool:
    """Whether this LLVM declares vpdpbusd and vpdpwssd with vectors of bytes and int16, as from 22 on, or of int32."""
    text = """declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, {0}, {0})
    define <16 x i32> @f(<16 x i32> %a, {0} %b) {{
      %r = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> %a, {0} %b, {0} %b)
      ret <16 x i32> %r }}"""
    try:
        binding.parse_assembly(text.format("<64 x i8>")).verify()
    except RuntimeError:
        return False
    return True


def _vnni(name):
    def emit(builder, acc, a, b):
        if not _vnni_takes_parts():
            a, b = (builder.bitcast(v, acc.type) for v in (a, b))
        return call(builder, f"llvm.x86.avx512.{name}", acc.type, acc, a, b)

    return emit


def _pairs(builder, u, s):
    """AVX2, u <= 127: sums of two products, which fit 16 bits: 2 * 127 * 128 < 2^15."""
    return call(builder, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(ir.IntType(16), 16), u, s)


def _pmaddwd(builder, acc, a, b):
    """AVX2: acc + sums of two products of 16-bit integers, in 32 bits."""
    return builder.add(acc, call(builder, "llvm.x86.avx2.pmadd.wd", acc.type, a, b))


def _add_pairs(builder, acc, pairs):
    """AVX2: acc + sums of two 16-bit integers, in 32 bits."""
    return _pmaddwd(builder, acc, pairs, constant(pairs.type, 1))


def _maddubs(builder, acc, u, s):
    return _add_pairs(builder, acc, _pairs(builder, u, s))


def _sdot(builder, acc, u, s):
    """NEON, u <= 127: such bytes are the same signed or unsigned."""
    return call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", acc.type, acc, u, s)


def _signed(builder, u):
    """u - 128 as a signed byte."""
    return builder.xor(u, constant(u.type, 128))


def _maddubs_signed(builder, acc, u, s):
    """AVX2: (u - 128) * s for s >= -127, as |u - 128| * (s with the sign of u - 128); 2 * 128 * 127 fits 16 bits."""
    w = _signed(builder, u)
    size = call(builder, "llvm.abs.v32i8", w.type, w, ir.Constant(ir.IntType(1), 0))
    return _maddubs(builder, acc, size, call(builder, "llvm.x86.avx2.psign.b", s.type, s, w))


def _sdot_signed(builder, acc, u, s):
    return _sdot(builder, acc, _signed(builder, u), s)


def _usdot(builder, acc, u, s):
    return call(builder, "llvm.aarch64.neon.usdot.v4i32.v16i8", acc.type, acc, u, s)


def _widened(builder, acc, u, s):
    """Any CPU: byte j of each group of 4, widened to 32 bits and multiplied."""
    for j in range(4):
        every4 = range(j, 64, 4)
        a = builder.zext(pick_lanes(builder, u, every4), _I32)
        b = builder.sext(pick_lanes(builder, s, every4), _I32)
        acc = builder.add(acc, builder.mul(a, b))
    return acc


def _widened_shorts(builder, acc, a, b):
    """Any CPU: integer j of each pair, widened to 32 bits and multiplied."""
    for j in range(2):
        x, y = (builder.sext(pick_lanes(builder, v, range(j, v.type.count, 2)), acc.type) for v in (a, b))
        acc = builder.add(acc, builder.mul(x, y))
    return acc


class _Family(NamedTuple):
    """How a CPU family multiplies vectors, in `parts` equal parts.

    small: for u <= 127 and any s; bytes: for any u and s >= -127; shorts: 16-bit integers; signed: whether `bytes`
    multiplies u - 128.
    """

    parts: int
    small: Callable
    bytes: Callable
    shorts: Callable
    signed: bool = False


def _family() -> _Family:
    family = cpu.family()
    if family == cpu.AVX512_VNNI:
        return _Family(1, _vnni("vpdpbusd.512"), _vnni("vpdpbusd.512"), _vnni("vpdpwssd.512"))
    if family == cpu.AVX_VNNI:
        return _Family(2, _vnni("vpdpbusd.256"), _vnni("vpdpbusd.256"), _vnni("vpdpwssd.256"))
    if family == cpu.AVX2:
        return _Family(2, _maddubs, _maddubs_signed, _pmaddwd, signed=True)
    if family == cpu.NEON_DOT and cpu.has_i8mm():
        return _Family(4, _sdot, _usdot, _widened_shorts)
    if family == cpu.NEON_DOT:
        return _Family(4, _sdot, _sdot_signed, _widened_shorts, signed=True)
    return _Family(1, _widened, _widened, _widened_shorts)


def _dot(choose, sums=i32x16, factors=u8x64):
    def emit(builder, acc, u, s):
        family = _family()
        return _by_parts(builder, family.parts, choose(family), acc, u, s)

    return primitive(sums, [sums, factors, factors], emit)


def _start_bytes(builder, minus_sum):
    return constant(_I32, 0) if _family().signed else builder.shl(minus_sum, constant(_I32, 7))


def _start_unsigned(builder, minus_sum):
    zero = constant(_I32, 0)
    return builder.sub(zero, builder.shl(minus_sum, constant(_I32, 7))) if _family().signed else zero


dot4_bytes = _dot(lambda family: family.bytes)
"""acc[i] + sum over j < 4 of u[4i + j] * s[4i + j], or of (u - 128) * s on CPU families that multiply signed bytes: any
u, s >= -127. Once all of s went through it, the total is that of (u - 128) * s if acc began as `start_bytes`, and that
of u * s if it began as `start_unsigned`. Exact, where the sum fits."""
dot4_small = _dot(lambda family: family.small)
"""acc[i] + sum over j < 4 of u[4i + j] * s[4i + j] on every CPU, for u <= 127 and any s. Exact, where the sum fits."""
start_bytes = primitive(i32x16, [i32x16], _start_bytes)
"""The acc that dot4_bytes begins with for (u - 128) * s, from minus the sum of all s."""
start_unsigned = primitive(i32x16, [i32x16], _start_unsigned)
"""Likewise for u * s."""


# ---------------------------------------------------------------- pairs of 16 bits


dot2 = _dot(lambda family: family.shorts, factors=i16x32)
"""acc[i] + sum over j < 2 of a[2i + j] * b[2i + j]. Exact, where the sum fits."""


# ---------------------------------------------------------------- pairs of bfloat16


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not have."""

    def _to_string(self):
        return "bfloat"


_BFLOATS = ir.VectorType(_BFloat(), 32)


def _dot2_bf16(builder, acc, a, b):
    if cpu.has_bf16():
        pairs = (builder.bitcast(v, _BFLOATS) for v in (a, b))
        return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", acc.type, acc, *pairs)
    for widen in (widen_odd, widen_even):
        acc = multiply_add(builder, widen(builder, a), widen(builder, b), acc)
    return acc


dot2_bf16 = primitive(f32x16, [f32x16, i16x32, i16x32], _dot2_bf16)
"""acc[i] + a[2i + 1] * b[2i + 1], then + a[2i] * b[2i], of bfloat16 held as their bits: as AVX512_BF16 does it.

Where that is an instruction, numbers below 2^-126 count as 0 and sums below it become 0."""


# ---------------------------------------------------------------- bytes with wide integers

# AVX2 takes five instructions for 32 products of bytes, two for 16 of 16 bits.
PAIRS = cpu.family() == cpu.AVX2
"""Whether wide integers are pairs of 16 bits, with one sum for all products, instead of digits: see `wide`."""

_PAIR = ir.VectorType(ir.IntType(16), 16)


def _wide(half, digits):
    """acc + the products of bytes with the first or the second words of wide integers.

    half: for pairs, widens one byte of each 16 bits; digits: multiplies digits.
    """

    def pairs(builder, acc, both, part):
        both, part = (builder.bitcast(v, _PAIR) for v in (both, part))
        return _pmaddwd(builder, acc, half(builder, both), part)

    def emit(builder, acc, both, part):
        if PAIRS:
            return _by_parts(builder, 2, pairs, acc, both, part)
        return digits(builder, _family(), acc, both, part)

    return primitive(i32x16, [i32x16, u8x64, u8x64], emit)


def _digits_unsigned(builder, family, acc, u, part):
    return _by_parts(builder, family.parts, family.bytes, acc, u, part)


def _digits_signed(builder, family, acc, s, part):
    return _by_parts(builder, family.parts, family.small, acc, part, s)


def _start_wide(builder, minus_sum):
    return builder.shl(minus_sum, constant(_I32, 7)) if PAIRS else _start_bytes(builder, minus_sum)


def _even_signed(builder, v):
    return builder.ashr(builder.shl(v, constant(v.type, 8)), constant(v.type, 8))


wide_first_unsigned = _wide(lambda b, v: b.and_(v, constant(v.type, 255)), _digits_unsigned)
wide_second_unsigned = _wide(lambda b, v: b.lshr(v, constant(v.type, 8)), _digits_unsigned)
start_wide = primitive(i32x16, [i32x16], _start_wide)
"""acc[i] + sum over j < 4 of (u[4i + j] - 128) * v[j] for four wide integers v: a product with their first word,
16 times, one with their second, and `start_wide` of minus the sum of all v, once. Exact for up to 1040 products, see
`wide`."""
wide_first_signed = _wide(_even_signed, _digits_signed)
wide_second_signed = _wide(lambda b, v: b.ashr(v, constant(v.type, 8)), _digits_signed)
"""Likewise for signed bytes and v >= 0, without a start."""


# ---------------------------------------------------------------- sums of nibbles

# AVX2 sums products of bytes in 16 bits first. Nibbles may stay there: 16 products are at most 16 * 15 * 128 < 2^15.
_SHORT = cpu.family() == cpu.AVX2

short_sums: Vector = i16x32 if _SHORT else i32x16
"""The vectors in which products of nibbles are first summed."""
SHORT_COLUMNS = 32 if _SHORT else 0
"""For how many columns that is exact; 0: for any number."""


def _short(builder, acc, u, s):
    return builder.add(acc, _pairs(builder, u, s))


def _end_short(builder, acc, short):
    return _by_parts(builder, 2, _add_pairs, acc, short) if _SHORT else short


begin_short = primitive(short_sums, [i32x16], lambda b, acc: constant(short_sums.llvm, 0) if _SHORT else acc)
"""What the sums of the next columns begin with; acc holds those of the columns before."""
dot4_short = _dot(lambda family: _short if _SHORT else family.small, short_sums)
"""dot4 on such sums, for u <= 15."""
end_short = primitive(i32x16, [i32x16, short_sums], _end_short)
"""acc plus what was added since begin_short(acc)."""
