"""SIMD values and register tiles as Numba types: kernels stay ordinary Python and compile to vector code.

A *vector* (`f32x16`, `i32x16`, `i16x32`, `u8x64`) is one LLVM vector value. It is 512 bits wide on every CPU: LLVM
splits it where registers are narrower. A *tile* is a small array of vectors on the stack. Where the loops
around it have constant bounds LLVM unrolls them, and every element of the tile becomes a register.

    acc = new_acc()                                   # new_acc = tile(f32x16, rows, 2), outside the kernel
    acc[m, n] = fma(to_f32(dots[m, n]), scale, acc[m, n])

Loads and stores: `simd_memory`. Operations across lanes: `simd_lanes`.
"""

import operator

import numpy as np
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
_INDEX = ir.IntType(64)
_WORD = ir.IntType(32)


# ---------------------------------------------------------------- building blocks


def primitive(result, parameters, emit):
    """An intrinsic of 1 to 4 arguments of exactly these types: emit(builder, *values) gives its LLVM value."""
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

    def four(typing_context, x, y, z, u):
        return (kind, codegen) if (x, y, z, u) == parameters else None

    return intrinsic((one, two, three, four)[len(parameters) - 1])


def call(builder, name, result, *args):
    """A call of an LLVM intrinsic."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def constant(llvm, value):
    """The vector that holds a value in every lane."""
    return ir.Constant(llvm, [value] * llvm.count)


def splat(builder, scalar, llvm):
    """The vector that holds a scalar in every lane."""
    undefined = ir.Constant(llvm, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_WORD, llvm.count), [0] * llvm.count))


def pick_lanes(builder, v, wanted):
    """The vector of v's lanes with these numbers."""
    mask = ir.Constant(ir.VectorType(_WORD, len(wanted)), list(wanted))
    return builder.shuffle_vector(v, ir.Constant(v.type, ir.Undefined), mask)


def join(builder, low, high):
    """The lanes of `low`, then those of `high`."""
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


# ---------------------------------------------------------------- making vectors

splat_f32 = primitive(f32x16, [types.float32], lambda b, x: splat(b, x, _F32))
"""A number in every lane."""
splat_i32 = primitive(i32x16, [types.int32], lambda b, x: splat(b, x, _I32))
"""Likewise."""
repeat4 = primitive(u8x64, [types.int32], lambda b, word: b.bitcast(splat(b, word, _I32), _U8))
"""The 4 bytes of a word, 16 times."""
repeat2 = primitive(i16x32, [types.int32], lambda b, word: b.bitcast(splat(b, word, _I32), _I16))
"""The 2 int16 of a word, 16 times."""


# ---------------------------------------------------------------- arithmetic


def _float_call(name):
    return lambda b, *args: call(b, f"llvm.{name}.v16f32", _F32, *args)


def multiply_add(builder, x, y, z):
    """x * y + z, rounded once where the CPU can."""
    if cpu.has_fma():
        return call(builder, "llvm.fma.v16f32", _F32, x, y, z)
    return builder.fadd(builder.fmul(x, y), z)


def maximum(builder, x, y):
    """x where it is larger, else y, also where one of them is NaN."""
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def minimum(builder, x, y):
    """x where it is smaller, else y, also where one of them is NaN."""
    return builder.select(builder.fcmp_ordered("<", x, y), x, y)


def larger(builder, x, y):
    """The larger of two signed integers."""
    return builder.select(builder.icmp_signed(">", x, y), x, y)


def _magnitude(builder, v):
    return builder.and_(builder.bitcast(v, _I32), constant(_I32, 0x7FFFFFFF))


fma = primitive(f32x16, [f32x16] * 3, multiply_add)
"""x * y + z, rounded once where the CPU can."""
vmax = primitive(f32x16, [f32x16] * 2, maximum)
"""The larger of two; the second where one of them is NaN."""
vmin = primitive(f32x16, [f32x16] * 2, minimum)
"""The smaller of two; the second where one of them is NaN."""
vmax_i32 = primitive(i32x16, [i32x16] * 2, larger)
"""The larger of two signed integers."""
magnitude = primitive(i32x16, [f32x16], _magnitude)
"""The bits of |x|, which as integers are in the order of the numbers, then infinity, then NaN."""
number_of = primitive(types.float32, [types.int32], lambda b, bits: b.bitcast(bits, ir.FloatType()))
"""The float32 with these bits."""
numbers_of = primitive(f32x16, [i32x16], lambda b, bits: b.bitcast(bits, _F32))
"""Likewise for every lane."""
vabs = primitive(f32x16, [f32x16], _float_call("fabs"))
"""|x|."""
to_f32 = primitive(f32x16, [i32x16], lambda b, v: b.sitofp(v, _F32))
"""The nearest float32 of an int32."""
round_i32 = primitive(i32x16, [f32x16], lambda b, v: call(b, "llvm.lrint.v16i32.v16f32", _I32, v))
"""To the nearest int32, ties to even. The values must fit."""


def _inverse(builder, v):
    normal = builder.fcmp_ordered(">=", v, constant(_F32, float(np.finfo(np.float32).tiny)))
    return builder.select(normal, builder.fdiv(constant(_F32, 1.0), v), constant(_F32, 0.0))


inverse = primitive(f32x16, [f32x16], _inverse)
"""1 / v; 0 where v is below float32's smallest normal number, infinite or NaN.

Reciprocals of smaller numbers may be infinite; a scale that is not finite is then the only mark of its numbers."""


def widen_even(builder, v):
    """Lanes 0, 2, 4 ... of bfloat16 held as their bits, as float32."""
    return builder.bitcast(builder.shl(builder.bitcast(v, _I32), constant(_I32, 16)), _F32)


def widen_odd(builder, v):
    """Lanes 1, 3, 5 ... likewise."""
    return builder.bitcast(builder.and_(builder.bitcast(v, _I32), constant(_I32, 0xFFFF0000)), _F32)


even_bf16, odd_bf16 = (primitive(f32x16, [i16x32], widen) for widen in (widen_even, widen_odd))
"""widen_even and widen_odd for kernels."""


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


def _exp(builder, x):
    """exp(x) = 2^n * exp(r), n = round(x / ln 2), |r| <= ln(2) / 2; 1e-7 relative.

    n ln 2 is subtracted in two parts (Cody and Waite), as in Cephes' expf. exp(r) = 1 + r + r^2 (c2 + c3 r + c4 r^2 +
    c5 r^3 + c6 r^4), minimax (4e-9), in pairs: a chain of products takes longer.

    Below -87 it may be anything, and becomes 0. `large` has no fraction: adding it rounds, and the sum's last bits are
    then the exponent of 2^n.
    """
    underflow = builder.fcmp_ordered("<", x, constant(_F32, -87.0))
    large = constant(_F32, 1.5 * 2**23 + 127)
    shifted = multiply_add(builder, x, constant(_F32, 1.4426950408889634), large)
    n = builder.fsub(shifted, large)
    r = multiply_add(builder, n, constant(_F32, -0.693359375), x)
    r = multiply_add(builder, n, constant(_F32, 2.12194440e-4), r)
    c2, c3, c4, c5, c6 = (
        constant(_F32, c) for c in (0.49999994, 0.166665206, 0.041668388, 0.0083687169, 0.00138145986)
    )
    square = builder.fmul(r, r)
    high = multiply_add(builder, square, c6, multiply_add(builder, r, c5, c4))
    p = multiply_add(builder, square, high, multiply_add(builder, r, c3, c2))
    p = builder.fadd(multiply_add(builder, square, p, r), constant(_F32, 1.0))
    power = builder.bitcast(builder.shl(builder.bitcast(shifted, _I32), constant(_I32, 23)), _F32)
    return builder.select(underflow, constant(_F32, 0.0), builder.fmul(p, power))


exp = primitive(f32x16, [f32x16], _exp)
"""exp(x) for x up to 88; 0 below -87."""


only_above = primitive(
    f32x16, [f32x16] * 2, lambda b, v, limit: b.select(b.fcmp_ordered(">", v, limit), v, constant(_F32, 0.0))
)
"""The first's lanes that are greater than the second's, 0 elsewhere."""

# ---------------------------------------------------------------- bytes


def _low_nibbles(builder, v):
    return builder.and_(v, constant(_U8, 15))


def _high_nibbles(builder, v):
    shifted = builder.lshr(builder.bitcast(v, _I16), constant(_I16, 4))
    return _low_nibbles(builder, builder.bitcast(shifted, _U8))


def _bit_pairs(builder, v, first):
    by = splat(builder, builder.trunc(first, _I32.element), _I32)
    return builder.and_(builder.bitcast(builder.lshr(builder.bitcast(v, _I32), by), _U8), constant(_U8, 3))


bit_pairs = primitive(u8x64, [u8x64, types.intp], _bit_pairs)
"""The 2 bits of each byte from bit `first` on."""
low_nibbles = primitive(u8x64, [u8x64], _low_nibbles)
"""The low 4 bits of each byte."""
high_nibbles = primitive(u8x64, [u8x64], _high_nibbles)
"""The high 4 bits of each byte, as 0 .. 15."""


def _add_high(width):
    """An intrinsic that puts `width` bits of other bytes above nibbles."""
    mask = constant(_U8, (1 << width) - 1 << 4)

    def emit(builder, low, high, first):
        # Bits rotate to bit 4 of their byte; what comes over from the bytes beside is masked.
        words = builder.bitcast(high, _I32)
        by = builder.sub(builder.trunc(first, _I32.element), ir.Constant(_I32.element, 4))
        moved = call(builder, "llvm.fshr.v16i32", _I32, words, words, splat(builder, by, _I32))
        return builder.or_(low, builder.and_(builder.bitcast(moved, _U8), mask))

    return primitive(u8x64, [u8x64, u8x64, types.intp], emit)


add_high = {width: _add_high(width) for width in (1, 2)}
"""add_high[width](low, high, first): low + 16 * the `width` bits of each byte of high from bit `first` on. low < 16."""


join_digits = primitive(i32x16, [i32x16] * 2, lambda b, high, low: b.add(b.shl(high, constant(_I32, 7)), low))
"""128 * high + low."""


def _times(n):
    def emit(builder, v):
        return builder.shl(v, constant(_I32, n.bit_length() - 1)) if n else constant(_I32, 0)

    return primitive(i32x16, [i32x16], emit)


times = {n: _times(n) for n in (0, 8, 16, 32)}
"""times[n](v): n * v."""
