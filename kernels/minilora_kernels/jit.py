"""How kernels are compiled.

`kernel` marks a function that other kernels call, `inlined` one that becomes part of them. `program` marks one that
Python calls: its machine code is kept on disk. Numba's own cache looks at one source file only and can mix up
processes that write at once, so the key here covers every kernel source, what else a program is made from (`sources`),
the versions of Numba and LLVM and the CPU, and each key has its file. Large parts are compiled apart, see `unit`.
"""

import hashlib
import pickle
from collections.abc import Callable, Iterable
from functools import cache
from types import FunctionType
from typing import Any

from numba.core import types
from numba.core.caching import CompileResultCacheImpl, _Cache
from numba.core.codegen import JITCodeLibrary
from numba.core.registry import CPUDispatcher
from numba.core.serialize import dumps

from .code_files import code_folder, code_path, read_code, write_code
from .compiling import compile_beside
from .passes import KernelCompiler
from .sources import source_key, spelled

# No reference counts: a kernel can't allocate, and arrays cost nothing to pass. No fastmath: the order of
# floating-point operations is a promise. No exceptions: division by zero gives infinity, as in NumPy.
FLAGS = {"nogil": True, "error_model": "numpy", "_nrt": False}

# forceinline: otherwise kernels inherit it from their caller.
_KERNEL = {"nopython": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "forceinline": False, **FLAGS}

_listeners: list[Callable[[str], None]] = []


class _Part(JITCodeLibrary):
    """A kernel's code, only simplified, so that it takes little memory: programs are optimised as a whole."""

    def _optimize_functions(self, ll_module):
        ll_module.data_layout = self._codegen._data_layout
        passes, builder = _simplifying(self._codegen)
        for function in ll_module.functions:
            if not function.is_declaration:
                passes.run(function, builder)

    def finalize(self):
        self._finalized = True

    def get_pointer_to_function(self, name):
        raise TypeError("a kernel runs inside a program only: wrap it with jit.program to call it from Python")


class Elsewhere:
    """What callers of a `unit.Unit` link with: nothing, but their program must have the unit loaded."""

    def __init__(self, unit: Any):
        self.unit = unit

    def _ensure_finalized(self) -> None:
        """Nothing to do, unlike in Numba's libraries."""


class Whole(JITCodeLibrary):
    """The code of a program or a unit: its own and that of every kernel below it, optimised and compiled once."""

    def __init__(self, codegen, name):
        super().__init__(codegen, name)
        self.enable_object_caching()

    def export(self, result, symbol: str) -> None:
        """Make a compiled kernel part of this code, under a symbol by which other code finds it."""
        self._final_module.link_in(result.library._final_module, preserve=True)
        self._final_module.get_function(result.fndesc.mangled_name).name = symbol
        self._linking_libraries.extend(result.library._linking_libraries)

    def finalize(self):
        self._own = {function.name for function in self.get_defined_functions()}
        below = _closure(self._linking_libraries)
        self._linking_libraries = [library for library in below if not isinstance(library, Elsewhere)]
        self.units = {library.unit for library in below if isinstance(library, Elsewhere)}
        super().finalize()

    def _optimize_final_module(self):
        # Kernels become private: Numba numbers its symbols anew in each process, so those of two programs that come
        # from the disk may be equal, and the wrong code would be called.
        for function in self.get_defined_functions():
            if function.name not in self._own:
                function.linkage = "internal"
        super()._optimize_final_module()
        for unit in self.units:
            unit.load()

    @property
    def object_code(self) -> bytes:
        """The machine code, as a file that a linker reads."""
        return self._get_compiled_object()


@cache
def _simplifying(codegen):
    """LLVM's cheapest passes. One set for all kernels: to make it anew costs as much as to run it."""
    return codegen._function_pass_manager(opt=1)


def _closure(libraries):
    """All libraries reachable through parts, each once."""
    seen, waiting = {}, list(libraries)
    while waiting:
        library = waiting.pop()
        if id(library) not in seen:
            seen[id(library)] = library
            if isinstance(library, _Part):
                waiting.extend(library._linking_libraries)
    return seen.values()


class _PartCompiler(KernelCompiler):
    def __init__(self, typingctx, targetctx, library, args, return_type, flags, locals):
        flags.no_compile = True
        super().__init__(typingctx, targetctx, _Part(targetctx.codegen(), "kernel"), args, return_type, flags, locals)


class _WholeCompiler(KernelCompiler):
    def __init__(self, typingctx, targetctx, library, args, return_type, flags, locals):
        library = Whole(targetctx.codegen(), "program")
        super().__init__(typingctx, targetctx, library, args, return_type, flags, locals)


class Kernel(CPUDispatcher):
    """A function for use inside programs and other kernels; it has no machine code of its own."""

    def __call__(self, *args, **kwargs):
        raise TypeError("a kernel runs inside a program only: jit.program(kernel) can be called from Python")

    def get_call_template(self, args, kws):
        # The same code for f(n), f(0) and f(1): Numba would compile anew for each literal.
        return super().get_call_template(tuple(types.unliteral(arg) for arg in args), kws)

    def add_overload(self, cres):
        # Callers find the code by its entry point, which is any object: there is nothing to enter.
        cres = cres._replace(entry_point=object(), type_annotation=None)
        cres.target_context.insert_user_function(cres.entry_point, cres.fndesc, [cres.library])
        self.overloads[tuple(cres.signature.args)] = cres


def kernel(function: Callable) -> Kernel:
    """Mark a function for use inside programs and other kernels. Nothing is compiled before it is used."""
    return Kernel(function, {}, _KERNEL, _PartCompiler)


def inlined(function: Callable) -> Kernel:
    """A kernel that becomes part of each caller: what is constant there, say a tile's size, is constant in it.

    Numba reads it once for all sizes, and LLVM unrolls each of them.
    """
    return Kernel(function, {}, {**_KERNEL, "forceinline": True}, _PartCompiler)


def program(
    function: Callable, constants: tuple = (), inner: Callable | None = None, units: Iterable[Any] = ()
) -> Callable:
    """Compile a function, or a kernel, for calls from Python, keeping the machine code on disk.

    constants: what the function's closure depends on, as plain values; inner: a function in its closure that it serves,
    where that is another one each time. Both are parts of the cache's key. units: those whose kernels it calls.
    """
    function, inner = _plain(function), _plain(inner or function)
    function = _renamed(function, inner, constants)
    dispatcher = CPUDispatcher(function, {}, {"nopython": True, "no_cfunc_wrapper": True, **FLAGS}, _WholeCompiler)
    dispatcher._cache = _DiskCache(function, inner, constants, units)
    return dispatcher


def _plain(function: Callable) -> Any:
    return getattr(function, "py_func", function)


def _renamed(function: Any, inner: Any, constants: tuple) -> Callable:
    """A copy named after `inner`, with a name, and so a symbol, that no other program has."""
    digest = hashlib.sha256(repr((inner.__module__, inner.__qualname__, constants)).encode()).hexdigest()
    copy = FunctionType(
        function.__code__, function.__globals__, inner.__name__, function.__defaults__, function.__closure__
    )
    copy.__qualname__ = f"{inner.__name__}_{digest[:12]}"
    copy.__module__ = function.__module__
    return copy


def on_compile(listener: Callable[[str], None]) -> None:
    """Call listener(name) for every program or unit whose machine code is not on disk."""
    _listeners.append(listener)


def _tell(name: str) -> None:
    for listener in _listeners:
        listener(name)


def _start(units) -> None:
    """Start compiling the units that are not on disk, in other processes if there are cores for it."""
    missing = [unit for unit in units if not unit.find()]
    for unit in missing:
        _tell(unit.name)
    for unit, compiling in zip(missing, compile_beside([unit.request for unit in missing]), strict=False):
        unit.compiling = compiling


class _DiskCache(_Cache):
    """Numba's interface to a cache of one function: a file for each signature."""

    def __init__(self, function, inner, constants, units):
        self._function, self._units = function, tuple(units)
        names = [unit.key for unit in self._units]
        self._key = repr((function.__module__, function.__qualname__, constants, source_key(inner), names))
        self._form = CompileResultCacheImpl(function)
        self._enabled = True

    @property
    def cache_path(self):
        return str(code_folder())

    def enable(self):
        self._enabled = True

    def disable(self):
        self._enabled = False

    def flush(self):
        for path in code_folder().glob(f"{self._function.__name__}-*.code"):
            path.unlink(missing_ok=True)

    def _path(self, signature):
        return code_path(self._function.__name__, f"{self._key}{[spelled(kind) for kind in signature]}")

    def load_overload(self, sig, target_context) -> Any:
        _start(self._units)
        data = read_code(self._path(sig)) if self._enabled else None
        if data is None:
            _tell(self._function.__name__)
            return None
        for unit in self._units:
            unit.load()
        # Numba would first look for all that it could compile with, which takes a third of a second.
        return self._form.rebuild(target_context, pickle.loads(data))

    def save_overload(self, sig, data) -> None:
        if not data.library.units <= set(self._units):
            # Loaded from disk it would run without them.
            raise TypeError(f"{self._function.__qualname__} calls kernels of units that it was not given")
        if self._enabled:
            write_code(self._path(sig), dumps(self._form.reduce(data)))
