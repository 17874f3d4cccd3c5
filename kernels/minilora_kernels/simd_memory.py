"""SIMD values from memory and back: loads, stores, prefetches, and their order.

Offsets count elements of the array that is read or written: bytes in a uint8 arena. Nothing is checked
against the array's length. float16 lives in memory only, loads widen it to float32; bfloat16 is loaded one by one,
widened, or as int16, in pairs.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing import signature
from numba.extending import intrinsic

from . import cpu
from .simd import constant, f32x16, i16x32, i32x16, maximum, minimum, pick_lanes, u8x64

_F32, _I32, _U8 = f32x16.llvm, i32x16.llvm, u8x64.llvm
_HALF = ir.VectorType(ir.HalfType(), 16)
_SHORT = ir.VectorType(ir.IntType(16), 16)
_BYTE = ir.VectorType(ir.IntType(8), 16)
_WORD = ir.IntType(32)


def _pointer(context, builder, sig, args, llvm):
    data = context.make_array(sig.args[0])(context, builder, args[0]).data
    return builder.bitcast(builder.gep(data, [args[1]]), llvm.as_pointer())


def _loader(result, stored, widen=None):
    """An intrinsic load(array, offset): `stored` as it lies in memory, widened to `result`."""

    @intrinsic
    def load(typing_context, array, offset):
        def codegen(context, builder, sig, args):
            value = builder.load(_pointer(context, builder, sig, args, stored))
            value.align = 1
            return widen(builder, value) if widen else value

        return result(array, types.intp), codegen

    return load


def _storer(vector, narrow=None):
    """An intrinsic store(array, offset, v): v narrowed to the form that lies in memory."""

    @intrinsic
    def store(typing_context, array, offset, v):
        def codegen(context, builder, sig, args):
            value = narrow(builder, args[2]) if narrow else args[2]
            builder.store(value, _pointer(context, builder, sig, args, value.type)).align = 1
            return context.get_dummy_value()

        return types.void(array, types.intp, vector), codegen

    return store


def _widen_scalar_bf16(builder, x):
    return builder.bitcast(builder.shl(builder.zext(x, _WORD), ir.Constant(_WORD, 16)), ir.FloatType())


def _number(kind, value):
    """A constant: in every lane of a vector, or a scalar."""
    return constant(kind, value) if isinstance(kind, ir.VectorType) else ir.Constant(kind, value)


def _widen_f16(builder, h, floats, words):
    """float32 of float16 held as 16-bit integers; floats, words: the LLVM types of result and of integers like it."""
    if cpu.has_half():
        halves = ir.VectorType(ir.HalfType(), 16) if isinstance(floats, ir.VectorType) else ir.HalfType()
        return builder.fpext(builder.bitcast(h, halves), floats)
    wide = builder.zext(h, words)
    sign = builder.shl(builder.and_(wide, _number(words, 0x8000)), _number(words, 16))
    size = builder.shl(builder.and_(wide, _number(words, 0x7FFF)), _number(words, 13))
    # The exponent's bias is 15, not 127: times 2^112, exact for subnormal numbers too.
    value = builder.bitcast(builder.fmul(builder.bitcast(size, floats), _number(floats, 2.0**112)), words)
    special = builder.icmp_unsigned(">=", size, _number(words, 0x0F800000))
    value = builder.select(special, builder.or_(size, _number(words, 0x7F800000)), value)
    return builder.bitcast(builder.or_(value, sign), floats)


def _narrow_f16(builder, v):
    """Round to nearest, ties to even; beyond the range of float16 its largest value, never infinity. NaN stays NaN."""
    limit = 65504.0
    v = maximum(builder, constant(_F32, -limit), minimum(builder, constant(_F32, limit), v))
    if cpu.has_half():
        return builder.bitcast(builder.fptrunc(v, _HALF), _SHORT)
    raw = builder.bitcast(v, _I32)
    sign = builder.and_(builder.lshr(raw, constant(_I32, 16)), constant(_I32, 0x8000))
    size = builder.and_(raw, constant(_I32, 0x7FFFFFFF))
    # Normal numbers: change the bias, then round by adding. Subnormal ones: adding 1/2 rounds them in place.
    odd = builder.and_(builder.lshr(size, constant(_I32, 13)), constant(_I32, 1))
    moved = builder.add(builder.add(size, odd), constant(_I32, 0xFFF - (112 << 23)))
    half = builder.bitcast(builder.fadd(builder.bitcast(size, _F32), constant(_F32, 0.5)), _I32)
    tiny = builder.icmp_unsigned("<", size, constant(_I32, 113 << 23))
    value = builder.select(tiny, builder.sub(half, constant(_I32, 0x3F000000)), builder.lshr(moved, constant(_I32, 13)))
    not_a_number = builder.icmp_unsigned(">", size, constant(_I32, 0x7F800000))
    value = builder.select(not_a_number, constant(_I32, 0x7E00), value)
    return builder.trunc(builder.or_(value, sign), _SHORT)


def _narrow_bf16(builder, v):
    """Round to nearest, ties to even. NaN stays NaN."""
    raw = builder.bitcast(v, _I32)
    odd = builder.and_(builder.lshr(raw, constant(_I32, 16)), constant(_I32, 1))
    rounded = builder.add(raw, builder.add(odd, constant(_I32, 0x7FFF)))
    value = builder.select(builder.fcmp_unordered("uno", v, v), constant(_I32, 0x7FC00000), rounded)
    return builder.trunc(builder.lshr(value, constant(_I32, 16)), _SHORT)


def _narrow_i8(builder, v):
    return builder.trunc(v, _BYTE)


def _narrow_i16(builder, v, first):
    return builder.trunc(pick_lanes(builder, v, range(first, 16, 2)), ir.VectorType(ir.IntType(16), 8))


def _sums_of_four(builder, v):
    """Lanes 0 to 3 together, then 4 to 7, ..."""
    parts = [pick_lanes(builder, v, range(i, 16, 4)) for i in range(4)]
    return builder.add(builder.add(parts[0], parts[1]), builder.add(parts[2], parts[3]))


def _narrow_u8x4(builder, v):
    bytes_ = builder.xor(builder.trunc(v, _BYTE), constant(_BYTE, 128))
    return builder.bitcast(bytes_, ir.VectorType(_WORD, 4))


def _scatterer(vector, narrow=None):
    """An intrinsic scatter(array, offset, step, v): lane i of v, or of its narrow form, goes to offset + i * step."""

    @intrinsic
    def scatter(typing_context, array, offset, step, v):
        def codegen(context, builder, sig, args):
            array_value, offset_value, step_value, v_value = args
            value = narrow(builder, v_value) if narrow else v_value
            pair = signature(types.void, sig.args[0], types.intp)
            for lane in range(value.type.count):
                place = _pointer(context, builder, pair, (array_value, offset_value), value.type.element)
                builder.store(builder.extract_element(value, ir.Constant(_WORD, lane)), place).align = 1
                offset_value = builder.add(offset_value, step_value)
            return context.get_dummy_value()

        return types.void(array, types.intp, types.intp, vector), codegen

    return scatter


load_u8 = _loader(u8x64, _U8)
"""64 bytes."""
load_f32 = _loader(f32x16, _F32)
"""16 float32."""
load_f16 = _loader(f32x16, _SHORT, lambda b, v: _widen_f16(b, v, _F32, _I32))
"""16 float16, as float32."""
load_i8 = _loader(f32x16, _BYTE, lambda b, v: b.sitofp(v, _F32))
"""16 int8, as float32."""
load_i16 = _loader(i16x32, i16x32.llvm)
"""32 int16."""
load_i16_of_i8 = _loader(i16x32, ir.VectorType(ir.IntType(8), 32), lambda b, v: b.sext(v, i16x32.llvm))
"""32 int8, as int16."""
load_i32 = _loader(i32x16, _I32)
"""16 int32."""
load_scalar_f32 = _loader(types.float32, ir.FloatType())
"""One float32."""
load_scalar_f16 = _loader(types.float32, ir.IntType(16), lambda b, v: _widen_f16(b, v, ir.FloatType(), _WORD))
"""One float16, as float32."""
load_scalar_bf16 = _loader(types.float32, ir.IntType(16), _widen_scalar_bf16)
"""One bfloat16, as float32."""
load_word = _loader(types.int32, _WORD)
"""Four bytes, as int32."""

store_f32 = _storer(f32x16)
"""16 float32."""
store_f16 = _storer(f32x16, _narrow_f16)
"""16 float32, as float16; beyond its range as its largest number."""
store_bf16 = _storer(f32x16, _narrow_bf16)
"""16 float32, as bfloat16."""
store_u8 = _storer(u8x64)
"""64 bytes."""
store_i8 = _storer(i32x16, _narrow_i8)
"""16 int32 in -128..127 as 16 bytes."""
store_i16 = _storer(i32x16, lambda b, v: b.trunc(v, _SHORT))
"""16 int32 in -2^15..2^15 - 1 as int16."""
store_high_digits = _storer(i32x16, lambda b, v: _narrow_i8(b, b.ashr(v, constant(_I32, 7))))
"""High digits of 16 int32 v = 128 * high + low, low in 0..127, as bytes."""
store_low_digits = _storer(i32x16, lambda b, v: _narrow_i8(b, b.and_(v, constant(_I32, 127))))
"""Their low digits."""
store_even_i16 = _storer(i32x16, lambda b, v: _narrow_i16(b, v, 0))
"""Lanes 0, 2, 4 ... of 16 int32, as 8 int16."""
store_odd_i16 = _storer(i32x16, lambda b, v: _narrow_i16(b, v, 1))
"""Lanes 1, 3, 5 ... likewise."""
store_i32 = _storer(i32x16)
"""16 int32."""
store_first = {n: _storer(f32x16, lambda b, v, n=n: pick_lanes(b, v, range(n))) for n in (1, 4)}
"""store_first[n]: the first n lanes of float32, 1 or 4."""
store_first_i32 = {n: _storer(i32x16, lambda b, v, n=n: pick_lanes(b, v, range(n))) for n in (1, 4)}
"""Likewise of int32."""
store_sums = _storer(i32x16, _sums_of_four)
"""The sums of each four neighbouring int32, as 4 int32."""
scatter_f32 = _scatterer(f32x16)
"""16 float32."""
scatter_f16 = _scatterer(f32x16, _narrow_f16)
"""16 float32, as float16 as in store_f16."""
scatter_i8 = _scatterer(i32x16, _narrow_i8)
"""16 int32 in -128..127, as bytes."""
scatter_u8x4 = _scatterer(i32x16, _narrow_u8x4)
"""16 int32 in -128..127, plus 128, as 4 words of 4 bytes."""


def _prefetcher(locality):
    """An intrinsic prefetch(array, offset) for a cache line; harmless beyond the array's end. locality() as in LLVM."""

    @intrinsic
    def emit(typing_context, array, offset):
        def codegen(context, builder, sig, args):
            place = _pointer(context, builder, sig, args, ir.IntType(8))
            kind = ir.FunctionType(ir.VoidType(), [place.type, _WORD, _WORD, _WORD])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            builder.call(function, [place, *(ir.Constant(_WORD, n) for n in (0, locality(), 1))])
            return context.get_dummy_value()

        return types.void(array, types.intp), codegen

    return emit


prefetch = _prefetcher(lambda: 3)
"""Prefetch the cache line at array[offset] into all caches."""
prefetch_once = _prefetcher(lambda: 0)
"""Prefetch a line of what is read once in a step: it should not evict what is read again."""
prefetch_soon = _prefetcher(lambda: 0 if cpu.streams_past_caches() else 2)
"""Likewise for kernels that compute as long as they read: on most CPUs into the second-level cache."""


@intrinsic
def compiler_barrier(typing_context):
    """No instruction, but the compiler moves no load, store or prefetch across it, and forgets what memory holds.

    Where it unrolls a loop with one prefetch in each turn it would issue all of them at once, and a core drops bursts.
    """

    def codegen(context, builder, sig, args):
        builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)
        return context.get_dummy_value()

    return types.void(), codegen
