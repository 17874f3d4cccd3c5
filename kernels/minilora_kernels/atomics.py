"""What compiled code needs to work beside other threads: atomic integers, pauses, clocks."""

import sys

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import cpu

_YIELD = {"win32": "SwitchToThread"}.get(sys.platform, "sched_yield")
# The scope of ARM's instruction barrier: there is no other choice.
_WHOLE_SYSTEM = 15


def slot_of(context, builder, sig, args):
    """The address of element args[1] of the array args[0]."""
    return builder.gep(context.make_array(sig.args[0])(context, builder, args[0]).data, [args[1]])


@intrinsic
def atomic_add(typing_context, array, i, value):
    """array[i] += value; returns what was there before."""

    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", slot_of(context, builder, sig, args), args[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), codegen


@intrinsic
def atomic_load(typing_context, array, i):
    """array[i]; after it, all that its writer wrote before is seen."""

    def codegen(context, builder, sig, args):
        return builder.load_atomic(slot_of(context, builder, sig, args), "acquire", 8)

    return types.int64(array, types.intp), codegen


@intrinsic
def atomic_store(typing_context, array, i, value):
    """array[i] = value, after all that this thread wrote before."""

    def codegen(context, builder, sig, args):
        builder.store_atomic(args[2], slot_of(context, builder, sig, args), "release", 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), codegen


@intrinsic
def atomic_compare_swap(typing_context, array, i, expected, value):
    """array[i] = value if it is `expected`; returns whether it was."""

    def codegen(context, builder, sig, args):
        swapped = builder.cmpxchg(slot_of(context, builder, sig, args), args[2], args[3], "seq_cst", "seq_cst")
        return builder.extract_value(swapped, 1)

    return types.boolean(array, types.intp, types.int64, types.int64), codegen


@intrinsic
def pause(typing_context):
    """Tell the core that this is a spin loop."""

    def codegen(context, builder, sig, args):
        triple = cpu.target()[0]
        if triple.startswith("x86_64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        elif triple.startswith(("aarch64", "arm64")):
            # `yield` does nothing on cores with one thread; this takes some 10 ns, as long as the pause of others.
            kind = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
            barrier = cgutils.get_or_insert_function(builder.module, kind, "llvm.aarch64.isb")
            builder.call(barrier, [ir.Constant(ir.IntType(32), _WHOLE_SYSTEM)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def yield_core(typing_context):
    """Let the operating system run another thread on this core."""

    def codegen(context, builder, sig, args):
        if binding.address_of_symbol(_YIELD):
            kind = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, _YIELD), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def nanoseconds(typing_context, clock):
    """What one of the system's clocks shows; 0 on systems without clock_gettime."""

    def codegen(context, builder, sig, args):
        if not binding.address_of_symbol("clock_gettime"):
            return ir.Constant(ir.IntType(64), 0)
        now = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(64), 2))
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32), now.type])
        call = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
        builder.call(call, [builder.trunc(args[0], ir.IntType(32)), now])
        seconds, rest = (builder.extract_value(builder.load(now), i) for i in range(2))
        return builder.add(builder.mul(seconds, ir.Constant(seconds.type, 10**9)), rest)

    return types.int64(types.int64), codegen
