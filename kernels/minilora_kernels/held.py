"""Named tuples that kernels pass on by address.

Numba hands a tuple over field by field, an array as seven of them: a tuple of all arrays of a step would make several
hundred arguments of every call, and most of what there is to compile. `hold` writes it to the stack once, and kernels
read c.name from there.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import intrinsic, lower_getattr_generic, register_model

from .sources import spelled

_ADDRESS = ir.IntType(8).as_pointer()


class Held(types.Type):
    """The address of a named tuple. Fields that are named tuples are held too, but not fields of theirs."""

    def __init__(self, content: types.BaseNamedTuple, inner: bool = False):
        self.content, self.inner = content, inner
        # Types of one name are one type to Numba.
        super().__init__(name=f"held({spelled(content)}, {inner})")

    def field(self, name: str) -> types.Type:
        """The type of a field as kernels see it."""
        kind = self.content.types[self.content.fields.index(name)]
        return Held(kind, inner=True) if isinstance(kind, types.BaseNamedTuple) and not self.inner else kind


@register_model(Held)
class _HeldModel(models.PrimitiveModel):
    def __init__(self, manager, held):
        super().__init__(manager, held, _ADDRESS)


@infer_getattr
class _Fields(AttributeTemplate):
    key = Held

    def generic_resolve(self, held, name):
        return held.field(name) if name in held.content.fields else None


@lower_getattr_generic(Held)
def _lower_field(context, builder, held, address, name):
    whole = builder.bitcast(address, context.get_value_type(held.content).as_pointer())
    place = cgutils.gep_inbounds(builder, whole, 0, held.content.fields.index(name))
    return builder.bitcast(place, _ADDRESS) if isinstance(held.field(name), Held) else builder.load(place)


def _hold(typing_context, content):
    def codegen(context, builder, sig, args):
        place = cgutils.alloca_once(builder, args[0].type)
        builder.store(args[0], place)
        return builder.bitcast(place, _ADDRESS)

    return (Held(content)(content), codegen) if isinstance(content, types.BaseNamedTuple) else None


def _by_value(typing_context, address):
    def codegen(context, builder, sig, args):
        return builder.load(builder.bitcast(args[0], context.get_value_type(address.content).as_pointer()))

    return (address.content(address), codegen) if isinstance(address, Held) else None


hold: Any = intrinsic(_hold)
"""hold(content): the address of a named tuple, written to the calling kernel's stack: valid until that returns."""
by_value: Any = intrinsic(_by_value)
"""by_value(address): the named tuple that lies there, for kernels whose loops should have its fields in registers."""
