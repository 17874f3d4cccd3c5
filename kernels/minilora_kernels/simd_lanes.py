"""Operations across the lanes of SIMD values: sums and maxima, single lanes, counts."""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .simd import Vector, f32x16, i32x16, larger, maximum, pick_lanes, primitive, splat

_F32, _I32 = f32x16.llvm, i32x16.llvm
_INDEX, _WORD = ir.IntType(64), ir.IntType(32)


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
"""The sum of all lanes, always in the same order."""
hmax = primitive(types.float32, [f32x16], _halving(maximum))
"""The largest lane, where none is NaN."""
hmax_i32 = primitive(types.int32, [i32x16], _halving(larger))
"""The largest lane."""
hsum_i32 = primitive(types.int32, [i32x16], _halving(lambda b, x, y: b.add(x, y)))
"""The sum of all lanes."""


first_lane = primitive(types.float32, [f32x16], lambda b, v: b.extract_element(v, ir.Constant(_WORD, 0)))
"""Lane 0."""


def _four_at_once(combine):
    """Fold each of four vectors to one number, with 8 shuffles; one by one each would take 4."""

    def emit(builder, *four):
        def shuffled(x, y, lanes):
            mask = [4 * quarter + lane % 4 + 16 * (lane // 4) for quarter in range(4) for lane in lanes]
            return builder.shuffle_vector(x, y, ir.Constant(_I32, mask))

        def pairs(x, y):
            return combine(builder, shuffled(x, y, (0, 2, 4, 6)), shuffled(x, y, (1, 3, 5, 7)))

        a, b, c, d = four
        # Within each quarter of the lanes, then over the quarters.
        v = pairs(pairs(a, b), pairs(c, d))
        for step in (8, 4):
            v = combine(builder, v, pick_lanes(builder, v, [i ^ step for i in range(16)]))
        return v

    return emit


hmax4_i32 = primitive(i32x16, [i32x16] * 4, _four_at_once(larger))
"""Lane 4 k + i: the largest of the i-th vector's lanes."""
hsum4_i32 = primitive(i32x16, [i32x16] * 4, _four_at_once(lambda b, x, y: b.add(x, y)))
"""Lane 4 k + i: the sum of the i-th vector's lanes."""


@intrinsic
def lane(typing_context, v, i):
    """Lane i of v in every lane."""

    def codegen(context, builder, sig, args):
        return splat(builder, builder.extract_element(*args), sig.return_type.llvm)

    return (v(v, types.intp), codegen) if isinstance(v, Vector) else None


@intrinsic
def keep_lanes(typing_context, v, first, end, other):
    """v in the lanes first <= i < end, the float32 `other` in the rest."""

    def codegen(context, builder, sig, args):
        v, first, end, other = args
        lanes = ir.Constant(_I32, list(range(16)))
        low = builder.icmp_signed(">=", lanes, splat(builder, builder.trunc(first, _WORD), _I32))
        high = builder.icmp_signed("<", lanes, splat(builder, builder.trunc(end, _WORD), _I32))
        return builder.select(builder.and_(low, high), v, splat(builder, other, _F32))

    return f32x16(f32x16, types.intp, types.intp, types.float32), codegen


def _count_above(builder, v, limit):
    above = builder.fcmp_ordered(">", v, limit)
    return builder.zext(builder.call(_ctpop(builder), [builder.bitcast(above, ir.IntType(16))]), _INDEX)


def _ctpop(builder):
    kind = ir.FunctionType(ir.IntType(16), [ir.IntType(16)])
    return cgutils.get_or_insert_function(builder.module, kind, "llvm.ctpop.i16")


count_above = primitive(types.intp, [f32x16, f32x16], _count_above)
"""How many lanes of the first are greater than the second's."""
