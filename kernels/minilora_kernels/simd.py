"""SIMD values and register tiles as Numba types: kernels stay ordinary Python and compile to vector code.

A *vector* (`f32x16`, `i32x16`, `i16x32`, `u8x64`) is one LLVM vector value. It is 512 bits wide on every CPU: LLVM
splits it where registers are narrower. A *tile* is a small array of vectors on the stack. Where the loops
around it have constant bounds LLVM unrolls them, and every element of the tile becomes a register.

    acc = new_acc()                                   # new_acc = tile(f32x16, rows, 2), outside the kernel
    acc[m, n] = fma(to_f32(dots[m, n]), scale, acc[m, n])

Offsets count elements of the array that is read or written: bytes in a uint8 arena. Nothing is checked
against the array's length. float16 and bfloat16 live in memory only: loads widen them to float32.
"""

import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.typing import signature
from numba.core.typing.templates import AbstractTemplate, ConcreteTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, register_model

from . import cpu

# ---------------------------------------------------------------- types

_ELEMENTS = {"u8": ir.IntType(8), "i16": ir.IntType(16), "i32": ir.IntType(32), "f32": ir.FloatType()}


class Vector(types.Type):
    """A fixed number of equal elements, held in registers."""

    def __init__(self, element: str, lanes: int):
        self.element, self.lanes = element, lanes
        self.llvm = ir.VectorType(_ELEMENTS[element], lanes)
        super().__init__(name=f"{element}x{lanes}")


class Tile(types.Type):
    """rows x columns vectors of one type, on the stack until LLVM puts them into registers."""

    def __init__(self, vector: Vector, rows: int, columns: int):
        self.vector, self.rows, self.columns = vector, rows, columns
        self.llvm = ir.ArrayType(vector.llvm, rows * columns)
        super().__init__(name=f"tile({rows} x {columns} x {vector})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, vector.llvm)


@register_model(Tile)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager, tile_type):
        super().__init__(manager, tile_type, tile_type.llvm.as_pointer())


f32x16, i32x16, i16x32, u8x64 = Vector("f32", 16), Vector("i32", 16), Vector("i16", 32), Vector("u8", 64)

_F32, _I32, _I16, _U8 = f32x16.llvm, i32x16.llvm, i16x32.llvm, u8x64.llvm
_HALF = ir.VectorType(ir.HalfType(), 16)
_SHORT = ir.VectorType(ir.IntType(16), 16)
_BYTE = ir.VectorType(ir.IntType(8), 16)
_INDEX = ir.IntType(64)
_WORD = ir.IntType(32)


# ---------------------------------------------------------------- building blocks


def primitive(result, parameters, emit):
    """An intrinsic of 1 to 3 arguments of exactly these types: emit(builder, *values) gives its LLVM value."""
    parameters = tuple(parameters)
    kind = result(*parameters)

    def codegen(context, builder, sig, args):
        return emit(builder, *args)

    def one(typing_context, x):
        return (kind, codegen) if (x,) == parameters else None

    def two(typing_context, x, y):
        return (kind, codegen) if (x, y) == parameters else None

    def three(typing_context, x, y, z):
        return (kind, codegen) if (x, y, z) == parameters else None

    return intrinsic((one, two, three)[len(parameters) - 1])


def call(builder, name, result, *args):
    """A call of an LLVM intrinsic."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def constant(llvm, value):
    """The vector that holds a value in every lane."""
    return ir.Constant(llvm, [value] * llvm.count)


def _splat(builder, scalar, llvm):
    undefined = ir.Constant(llvm, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_WORD, llvm.count), [0] * llvm.count))


def pick_lanes(builder, v, wanted):
    """The vector of v's lanes with these numbers."""
    mask = ir.Constant(ir.VectorType(_WORD, len(wanted)), list(wanted))
    return builder.shuffle_vector(v, ir.Constant(v.type, ir.Undefined), mask)


def join(builder, low, high):
    """One vector of two."""
    mask = ir.Constant(ir.VectorType(_WORD, 2 * low.type.count), list(range(2 * low.type.count)))
    return builder.shuffle_vector(low, high, mask)


# ---------------------------------------------------------------- tiles


def tile(vector: Vector, rows: int, columns: int = 1):
    """A function for kernels that makes a new Tile; its contents are undefined until written."""
    kind = Tile(vector, rows, columns)

    @intrinsic
    def new(typing_context):
        return kind(), lambda context, builder, sig, args: cgutils.alloca_once(builder, kind.llvm)

    return new


def _element(context, builder, kind, tile_pointer, index_type, index):
    """Pointer to tile[row, column] or tile[row]."""
    types_, values = [index_type], [index]
    if isinstance(index_type, types.BaseTuple):
        types_, values = list(index_type.types), cgutils.unpack_tuple(builder, index)
    row, *column = (context.cast(builder, v, t, types.intp) for v, t in zip(values, types_, strict=True))
    flat = builder.mul(row, ir.Constant(_INDEX, kind.columns))
    if column:
        flat = builder.add(flat, column[0])
    return builder.gep(tile_pointer, [ir.Constant(_INDEX, 0), flat])


def _is_tile_index(index) -> bool:
    parts = index.types if isinstance(index, types.BaseTuple) else (index,)
    return len(parts) <= 2 and all(isinstance(part, types.Integer) for part in parts)


@infer_global(operator.getitem)
class _TileGet(AbstractTemplate):
    def generic(self, args, kws):
        t, index = args
        if isinstance(t, Tile) and _is_tile_index(index):
            return signature(t.vector, t, index)


@infer_global(operator.setitem)
class _TileSet(AbstractTemplate):
    def generic(self, args, kws):
        t, index, value = args
        if isinstance(t, Tile) and _is_tile_index(index) and value == t.vector:
            return signature(types.none, t, index, value)


@lower_builtin(operator.getitem, Tile, types.Any)
def _lower_tile_get(context, builder, sig, args):
    return builder.load(_element(context, builder, sig.args[0], args[0], sig.args[1], args[1]))


@lower_builtin(operator.setitem, Tile, types.Any, types.Any)
def _lower_tile_set(context, builder, sig, args):
    builder.store(args[2], _element(context, builder, sig.args[0], args[0], sig.args[1], args[1]))
    return context.get_dummy_value()


# ---------------------------------------------------------------- memory


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


def _widen_bf16(builder, v):
    return builder.bitcast(builder.shl(builder.zext(v, _I32), constant(_I32, 16)), _F32)


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
    # The exponent counts from 15, not 127: times 2^112, exact for small numbers too.
    value = builder.bitcast(builder.fmul(builder.bitcast(size, floats), _number(floats, 2.0**112)), words)
    special = builder.icmp_unsigned(">=", size, _number(words, 0x0F800000))
    value = builder.select(special, builder.or_(size, _number(words, 0x7F800000)), value)
    return builder.bitcast(builder.or_(value, sign), floats)


def _narrow_f16(builder, v):
    """Round to nearest, ties to even; beyond the range of float16 its largest value, never infinity. NaN stays NaN."""
    limit = 65504.0
    v = _maximum(builder, constant(_F32, -limit), _minimum(builder, constant(_F32, limit), v))
    if cpu.has_half():
        return builder.bitcast(builder.fptrunc(v, _HALF), _SHORT)
    raw = builder.bitcast(v, _I32)
    sign = builder.and_(builder.lshr(raw, constant(_I32, 16)), constant(_I32, 0x8000))
    size = builder.and_(raw, constant(_I32, 0x7FFFFFFF))
    # Normal numbers: move the exponent, then round by adding. Small ones: adding 1/2 rounds them in place.
    odd = builder.and_(builder.lshr(size, constant(_I32, 13)), constant(_I32, 1))
    moved = builder.add(builder.add(size, odd), constant(_I32, 0xFFF - (112 << 23)))
    half = builder.bitcast(builder.fadd(builder.bitcast(size, _F32), constant(_F32, 0.5)), _I32)
    tiny = builder.icmp_unsigned("<", size, constant(_I32, 113 << 23))
    value = builder.select(tiny, builder.sub(half, constant(_I32, 0x3F000000)), builder.lshr(moved, constant(_I32, 13)))
    not_a_number = builder.icmp_unsigned(">", size, constant(_I32, 0x7F800000))
    value = builder.select(not_a_number, constant(_I32, 0x7E00), value)
    return builder.trunc(builder.or_(value, sign), _SHORT)


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
load_f32 = _loader(f32x16, _F32)
load_f16 = _loader(f32x16, _SHORT, lambda b, v: _widen_f16(b, v, _F32, _I32))
load_bf16 = _loader(f32x16, _SHORT, _widen_bf16)
load_i8 = _loader(f32x16, _BYTE, lambda b, v: b.sitofp(v, _F32))
"""16 values from int8, as float32."""
load_i32 = _loader(i32x16, _I32)
load_scalar_f32 = _loader(types.float32, ir.FloatType())
load_scalar_f16 = _loader(types.float32, ir.IntType(16), lambda b, v: _widen_f16(b, v, ir.FloatType(), _WORD))
load_scalar_bf16 = _loader(types.float32, ir.IntType(16), _widen_scalar_bf16)
load_word = _loader(types.int32, _WORD)

store_f32 = _storer(f32x16)
store_f16 = _storer(f32x16, _narrow_f16)
store_u8 = _storer(u8x64)
store_i8 = _storer(i32x16, _narrow_i8)
"""16 int32 in -128..127 as 16 bytes."""
store_high_digits = _storer(i32x16, lambda b, v: _narrow_i8(b, b.ashr(v, constant(_I32, 7))))
store_low_digits = _storer(i32x16, lambda b, v: _narrow_i8(b, b.and_(v, constant(_I32, 127))))
"""v = 128 * high + low, low in 0..127: 16 of one as bytes."""
store_even_i16 = _storer(i32x16, lambda b, v: _narrow_i16(b, v, 0))
store_odd_i16 = _storer(i32x16, lambda b, v: _narrow_i16(b, v, 1))
"""Every other one of 16 int32, as 8 int16."""
store_i32 = _storer(i32x16)
store_sums = _storer(i32x16, _sums_of_four)
"""Each sum of four neighbouring int32, as 4 int32."""
scatter_f32 = _scatterer(f32x16)
scatter_f16 = _scatterer(f32x16, _narrow_f16)
scatter_i8 = _scatterer(i32x16, _narrow_i8)
scatter_u8x4 = _scatterer(i32x16, _narrow_u8x4)
"""16 int32 in -128..127, plus 128, as 4 words of 4 bytes."""


def _prefetcher(locality):
    """An intrinsic ask(array, offset) for a cache line; beyond the array's end nothing happens. locality() as in LLVM."""

    @intrinsic
    def ask(typing_context, array, offset):
        def codegen(context, builder, sig, args):
            place = _pointer(context, builder, sig, args, ir.IntType(8))
            kind = ir.FunctionType(ir.VoidType(), [place.type, _WORD, _WORD, _WORD])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            builder.call(function, [place, *(ir.Constant(_WORD, n) for n in (0, locality(), 1))])
            return context.get_dummy_value()

        return types.void(array, types.intp), codegen

    return ask


prefetch = _prefetcher(lambda: 3)
"""Ask for the cache line at array[offset], to have it in all caches."""
prefetch_once = _prefetcher(lambda: 0)
"""Ask for a cache line of what is read once in a step: it should not push out of the caches what is read again."""
prefetch_beside = _prefetcher(lambda: 0 if cpu.streams_past_caches() else 2)
"""Likewise for kernels that compute as long as they read: on most CPUs into the second-level cache."""


# ---------------------------------------------------------------- making vectors

splat_f32 = primitive(f32x16, [types.float32], lambda b, x: _splat(b, x, _F32))
splat_i32 = primitive(i32x16, [types.int32], lambda b, x: _splat(b, x, _I32))
repeat4 = primitive(u8x64, [types.int32], lambda b, word: b.bitcast(_splat(b, word, _I32), _U8))
"""The 4 bytes of a word, 16 times."""


# ---------------------------------------------------------------- arithmetic


def _float_call(name):
    return lambda b, *args: call(b, f"llvm.{name}.v16f32", _F32, *args)


def _fma(builder, x, y, z):
    if cpu.has_fma():
        return call(builder, "llvm.fma.v16f32", _F32, x, y, z)
    return builder.fadd(builder.fmul(x, y), z)


def _maximum(builder, x, y):
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def _minimum(builder, x, y):
    return builder.select(builder.fcmp_ordered("<", x, y), x, y)


def _larger(builder, x, y):
    return builder.select(builder.icmp_signed(">", x, y), x, y)


def _magnitude(builder, v):
    return builder.and_(builder.bitcast(v, _I32), constant(_I32, 0x7FFFFFFF))


fma = primitive(f32x16, [f32x16] * 3, _fma)
"""x * y + z, rounded once where the CPU can."""
vmax = primitive(f32x16, [f32x16] * 2, _maximum)
vmin = primitive(f32x16, [f32x16] * 2, _minimum)
"""The larger and the smaller of two; the second where one of them is NaN."""
vmax_i32 = primitive(i32x16, [i32x16] * 2, _larger)
magnitude = primitive(i32x16, [f32x16], _magnitude)
"""The bits of |x|: as integers in the order of the numbers, then infinity, then NaN."""
number_of = primitive(types.float32, [types.int32], lambda b, bits: b.bitcast(bits, ir.FloatType()))
"""The float32 with these bits."""
vabs = primitive(f32x16, [f32x16], _float_call("fabs"))
to_f32 = primitive(f32x16, [i32x16], lambda b, v: b.sitofp(v, _F32))
round_i32 = primitive(i32x16, [f32x16], lambda b, v: b.fptosi(_float_call("roundeven")(b, v), _I32))
"""To the nearest int32, ties to even. The values must fit."""


def _operator(op, **emitters):
    """Define `x op y` for two vectors of the same type: its emitter by the type's name."""
    vectors = [v for v in (f32x16, i32x16) if v.name in emitters]

    @infer_global(op)
    class Template(ConcreteTemplate):
        cases = [signature(v, v, v) for v in vectors]

    for v in vectors:
        emit = emitters[v.name]
        lower_builtin(op, v, v)(lambda context, builder, sig, args, emit=emit: emit(builder, *args))


_operator(operator.add, f32x16=ir.IRBuilder.fadd, i32x16=ir.IRBuilder.add)
_operator(operator.sub, f32x16=ir.IRBuilder.fsub, i32x16=ir.IRBuilder.sub)
_operator(operator.mul, f32x16=ir.IRBuilder.fmul)
_operator(operator.truediv, f32x16=ir.IRBuilder.fdiv)


def _halving(combine):
    """Fold 16 lanes to one: 8 + 8, 4 + 4, 2 + 2, 1 + 1. The same order on every CPU."""

    def emit(builder, v):
        while v.type.count > 1:
            half = v.type.count // 2
            low, high = pick_lanes(builder, v, range(half)), pick_lanes(builder, v, range(half, 2 * half))
            v = (
                combine(builder, low, high)
                if half > 1
                else combine(builder, *(builder.extract_element(x, ir.Constant(_WORD, 0)) for x in (low, high)))
            )
            if half == 1:
                return v

    return emit


hsum = primitive(types.float32, [f32x16], _halving(lambda b, x, y: b.fadd(x, y)))
hmax = primitive(types.float32, [f32x16], _halving(_maximum))
hmax_i32 = primitive(types.int32, [i32x16], _halving(_larger))
hsum_i32 = primitive(types.int32, [i32x16], _halving(lambda b, x, y: b.add(x, y)))


@intrinsic
def keep_lanes(typing_context, v, first, end, other):
    """v in the lanes first <= i < end, the float32 `other` in the rest."""

    def codegen(context, builder, sig, args):
        v, first, end, other = args
        lanes = ir.Constant(_I32, list(range(16)))
        low = builder.icmp_signed(">=", lanes, _splat(builder, builder.trunc(first, _WORD), _I32))
        high = builder.icmp_signed("<", lanes, _splat(builder, builder.trunc(end, _WORD), _I32))
        return builder.select(builder.and_(low, high), v, _splat(builder, other, _F32))

    return f32x16(f32x16, types.intp, types.intp, types.float32), codegen


def _exp(builder, x):
    """exp(x) = 2^n * exp(r), n = round(x / ln 2), |r| <= ln(2) / 2, exp(r) by the Cephes polynomial (1e-7 relative).

    A number this large has no fraction: adding it rounds, and its last bits are then the exponent of 2^n.
    """
    underflow = builder.fcmp_ordered("<", x, constant(_F32, -87.0))
    x = _maximum(builder, constant(_F32, -87.0), x)
    x = _minimum(builder, constant(_F32, 88.0), x)
    large = constant(_F32, 1.5 * 2**23 + 127)
    shifted = _fma(builder, x, constant(_F32, 1.4426950408889634), large)
    n = builder.fsub(shifted, large)
    r = _fma(builder, n, constant(_F32, -0.693359375), x)
    r = _fma(builder, n, constant(_F32, 2.12194440e-4), r)
    p = constant(_F32, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
        p = _fma(builder, p, r, constant(_F32, c))
    power = builder.bitcast(builder.shl(builder.bitcast(shifted, _I32), constant(_I32, 23)), _F32)
    return builder.select(underflow, constant(_F32, 0.0), builder.fmul(p, power))


exp = primitive(f32x16, [f32x16], _exp)
"""exp(x): 0 below -87, the value at 88 above 88."""


def _count_above(builder, v, limit):
    above = builder.fcmp_ordered(">", v, limit)
    return builder.zext(builder.call(_ctpop(builder), [builder.bitcast(above, ir.IntType(16))]), _INDEX)


def _ctpop(builder):
    kind = ir.FunctionType(ir.IntType(16), [ir.IntType(16)])
    return cgutils.get_or_insert_function(builder.module, kind, "llvm.ctpop.i16")


count_above = primitive(types.intp, [f32x16, f32x16], _count_above)
"""How many lanes of the first are greater than the second's."""
only_above = primitive(
    f32x16, [f32x16] * 2, lambda b, v, limit: b.select(b.fcmp_ordered(">", v, limit), v, constant(_F32, 0.0))
)
"""The lanes of the first that are greater than the second's, 0 for others."""

# ---------------------------------------------------------------- bytes


def _low_nibbles(builder, v):
    return builder.and_(v, constant(_U8, 15))


def _high_nibbles(builder, v):
    shifted = builder.lshr(builder.bitcast(v, _I16), constant(_I16, 4))
    return _low_nibbles(builder, builder.bitcast(shifted, _U8))


low_nibbles = primitive(u8x64, [u8x64], _low_nibbles)
high_nibbles = primitive(u8x64, [u8x64], _high_nibbles)


join_digits = primitive(i32x16, [i32x16] * 2, lambda b, high, low: b.add(b.shl(high, constant(_I32, 7)), low))
"""128 * high + low."""
times8 = primitive(i32x16, [i32x16], lambda b, v: b.shl(v, constant(_I32, 3)))
