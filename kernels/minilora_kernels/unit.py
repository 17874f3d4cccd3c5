"""Units: kernels that are compiled apart from the programs that call them, in processes of their own.

Compiling a step takes one core many seconds. `@unit` on a function that makes kernels lets a program have its largest
parts compiled beside it, and share them with other programs:

    @unit(lambda factor: [signature(types.float64, types.float64)])    # of each kernel, from the same constants
    def make_times(factor): ...

    multiplying = make_times.unit(3)
    [times] = multiplying.kernels              # to call in other kernels
    program(..., units=[multiplying])

Callers find a unit by symbols that are the same in every process.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache, update_wrapper
from typing import Any

from llvmlite import binding
from numba.core.compiler import compile_result
from numba.core.compiler_lock import global_compiler_lock
from numba.core.funcdesc import ExternalFunctionDescriptor
from numba.core.registry import cpu_target
from numba.core.typing import Signature

from .code_files import code_path, read_code, write_code
from .compiling import Compiling, Request
from .jit import Elsewhere, Kernel, Whole, kernel
from .sources import source_key


class Maker:
    """A function that makes kernels from plain values, or with `unit` the unit of these kernels."""

    def __init__(self, make: Callable, signatures: Callable[..., Sequence[Signature]]):
        self._make, self._signatures = cache(make), signatures
        update_wrapper(self, make)
        self.unit = cache(self._unit)

    def __call__(self, *constants) -> Any:
        """What the function makes, the very same each time."""
        return self._make(*constants)

    def _unit(self, *constants) -> "Unit":
        return Unit(self, constants, self._signatures(*constants))


def unit(signatures: Callable[..., Sequence[Signature]]) -> Callable[[Callable], Maker]:
    """Mark a function that makes a kernel, or a tuple of them. signatures: a function of the same constants."""
    return lambda make: Maker(make, signatures)


class Unit:
    """The kernels of one Maker for some constants.

    kernels: for use in other kernels, whose program must name the unit; they take what their signatures say, no other
    types. key: a name for all that they are. compiling: the process that makes their code, if one does.
    """

    def __init__(self, maker: Any, constants: tuple, signatures: Sequence[Signature]):
        made = maker(*constants)
        self._own = made if isinstance(made, tuple) else (made,)
        self._signatures = signatures
        self.name = maker.__name__.removeprefix("make_")
        self.request: Request = (maker.__module__, maker.__qualname__, constants)
        self.key = repr((self.request, signatures, source_key(maker.__wrapped__)))
        digest = hashlib.sha256(self.key.encode()).hexdigest()[:24]
        self._symbols = [f"minilora_{digest}_{i}" for i in range(len(signatures))]
        each = zip(self._own, signatures, self._symbols, strict=True)
        self.kernels = tuple(_outside(self, *one) for one in each)
        self._code: bytes | None = None
        self.compiling: Compiling | None = None
        self._loaded = False

    @property
    def _path(self):
        return code_path(self.name, self.key)

    def find(self) -> bool:
        """Whether its machine code is at hand, or being made."""
        if not (self._loaded or self._code or self.compiling):
            self._code = read_code(self._path)
        return bool(self._loaded or self._code or self.compiling)

    def load(self) -> None:
        """Load the machine code into this process, compiling it here if nobody has."""
        if self._loaded or (self.find() and self._take()):
            return
        write_code(self._path, self.compile())
        self._loaded = True

    def _take(self) -> bool:
        """Load what is at hand or was made by another process; returns whether there was any."""
        if self.compiling:
            self._code, self.compiling = self.compiling.result(self.request), None
            if self._code:
                write_code(self._path, self._code)
        if self._code:
            engine = cpu_target.target_context.codegen()._engine._ee
            engine.add_object_file(binding.ObjectFileRef.from_data(self._code))
            engine.finalize_object()
            self._loaded, self._code = True, None
        return self._loaded

    def compile(self) -> bytes:
        """The machine code, as object file; it is then in this process too.

        Raises TypeError where a kernel returns another type than its signature says, or calls another unit's.
        """
        whole = Whole(cpu_target.target_context.codegen(), "unit")
        with global_compiler_lock:
            for own, signature, symbol in zip(self._own, self._signatures, self._symbols, strict=True):
                own.compile(signature.args)
                result = own.overloads[signature.args]
                if result.signature != signature:
                    raise TypeError(f"{own.py_func.__qualname__} is {result.signature}, not {signature}")
                whole.export(result, symbol)
            whole.finalize()
        if whole.units:
            raise TypeError(f"kernels of {self.name} call those of another unit, which is not supported")
        return whole.object_code


def _outside(unit: Unit, own: Kernel, signature: Signature, symbol: str) -> Kernel:
    """A kernel of a unit as its callers see it: a signature and a symbol."""
    seen = kernel(own.py_func)
    result = compile_result(
        typing_context=cpu_target.typing_context,
        target_context=cpu_target.target_context,
        signature=signature,
        fndesc=ExternalFunctionDescriptor(symbol, signature.return_type, signature.args),
        library=Elsewhere(unit),
    )
    seen.add_overload(result)
    seen.disable_compile()
    return seen
