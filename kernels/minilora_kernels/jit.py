"""How kernels are compiled, and where their machine code is kept.

`kernel` marks a function that other kernels call, `inlined` one that becomes part of them. `program` marks one that
Python calls: its machine code is kept on disk. Numba's own cache looks at one source file only and can mix up
processes that write at once, so the key here covers every kernel source, the versions of Numba and LLVM and the CPU,
and each key has its file.

The files hold pickled data (Numba's own form), so they are read only from a folder that nobody else may write.
"""

import hashlib
import inspect
import os
import pickle
import stat
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from numbers import Number
from pathlib import Path
from types import FunctionType
from typing import Any

import llvmlite
import numba
from numba.core import types
from numba.core.caching import CompileResultCacheImpl, _Cache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.registry import CPUDispatcher
from numba.core.serialize import dumps

from . import cpu

# No reference counts: a kernel can't allocate, and arrays cost nothing to pass. No fastmath: the order of
# floating-point operations is a promise. No exceptions: division by zero gives infinity, as in NumPy.
FLAGS = {"nogil": True, "error_model": "numpy", "_nrt": False}

# forceinline: otherwise kernels inherit it from their caller.
_KERNEL = {"nopython": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "forceinline": False, **FLAGS}

_listeners: list[Callable[[str], None]] = []


class _Part(JITCodeLibrary):
    """A kernel's code: only simplified, so that it takes little memory, until the program that needs it is optimised as
    a whole."""

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


class _Whole(JITCodeLibrary):
    """A program's code: its own and that of every kernel below it, optimised and compiled once."""

    def finalize(self):
        self._own = {function.name for function in self.get_defined_functions()}
        self._linking_libraries = list(_closure(self._linking_libraries))
        super().finalize()

    def _optimize_final_module(self):
        # Kernels become private: Numba numbers its symbols anew in each process, so those of two programs that come
        # from the disk may be equal, and the wrong code would be called.
        for function in self.get_defined_functions():
            if function.name not in self._own:
                function.linkage = "internal"
        super()._optimize_final_module()


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


class _PartCompiler(Compiler):
    def __init__(self, typingctx, targetctx, library, args, return_type, flags, locals):
        flags.no_compile = True
        super().__init__(typingctx, targetctx, _Part(targetctx.codegen(), "kernel"), args, return_type, flags, locals)


class _WholeCompiler(Compiler):
    def __init__(self, typingctx, targetctx, library, args, return_type, flags, locals):
        library = _Whole(targetctx.codegen(), "program")
        library.enable_object_caching()
        super().__init__(typingctx, targetctx, library, args, return_type, flags, locals)


class Kernel(CPUDispatcher):
    """A function for use inside programs and other kernels; it has no machine code of its own."""

    def __call__(self, *args, **kwargs):
        raise TypeError("a kernel runs inside a program only: jit.program(kernel) can be called from Python")

    def get_call_template(self, args, kws):
        # One code for f(n), f(0) and f(1): Numba would compile anew for each literal.
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


def program(function: Callable, constants: tuple = (), inner: Callable | None = None) -> Callable:
    """Compile a function, or a kernel, for calls from Python, keeping the machine code on disk.

    constants: what the function's closure depends on, as plain values; inner: a function in its closure that it serves,
    where that is another one each time. Both are parts of the cache's key.
    """
    function, inner = _plain(function), _plain(inner or function)
    function = _renamed(function, inner, constants)
    dispatcher = CPUDispatcher(function, {}, {"nopython": True, "no_cfunc_wrapper": True, **FLAGS}, _WholeCompiler)
    dispatcher._cache = _DiskCache(function, inner, constants)
    return dispatcher


def _plain(function: Callable) -> Any:
    return getattr(function, "py_func", function)


def _renamed(function: Any, inner: Any, constants: tuple) -> Callable:
    """A copy named after `inner`, whose name, and so the name of its symbol, is that of no other program."""
    digest = hashlib.sha256(repr((inner.__module__, inner.__qualname__, constants)).encode()).hexdigest()
    copy = FunctionType(
        function.__code__, function.__globals__, inner.__name__, function.__defaults__, function.__closure__
    )
    copy.__qualname__ = f"{inner.__name__}_{digest[:12]}"
    copy.__module__ = function.__module__
    return copy


def on_compile(listener: Callable[[str], None]) -> None:
    """Call listener(name) whenever a program must be compiled because its machine code is not on disk."""
    _listeners.append(listener)


def cache_root() -> Path:
    """The folder for everything that can be made again: $MINILORA_CACHE or the platform's cache folder."""
    if given := os.environ.get("MINILORA_CACHE"):
        return Path(given)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "minilora"


def code_folder() -> Path:
    """Where machine code for this CPU, these sources and these versions is kept."""
    return cache_root() / "kernels" / _environment_key()


@cache
def _environment_key() -> str:
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    triple, name, features = cpu.target()
    versions = (numba.__version__, llvmlite.__version__, sys.version_info[:2], FLAGS)
    digest.update(repr((triple, name, sorted(features), versions, _compiler_switches())).encode())
    return digest.hexdigest()[:24]


def _compiler_switches() -> tuple:
    return numba.config.BOUNDSCHECK, str(numba.config.OPT)


class _DiskCache(_Cache):
    """Numba's interface to a cache of one function: a file for each signature."""

    def __init__(self, function, inner, constants):
        self._function = function
        source = hashlib.sha256(Path(inspect.getfile(inner)).read_bytes()).hexdigest()
        # Compiled in, and perhaps imported from another file.
        numbers = sorted((name, repr(x)) for name, x in inner.__globals__.items() if isinstance(x, Number))
        self._key = repr((function.__module__, function.__qualname__, constants, source, numbers))
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

    def _path(self, signature) -> Path:
        digest = hashlib.sha256(f"{self._key}{signature}".encode()).hexdigest()[:24]
        return code_folder() / f"{self._function.__name__}-{digest}.code"

    def load_overload(self, sig, target_context) -> Any:
        data = _read(self._path(sig)) if self._enabled else None
        if data is None:
            for listener in _listeners:
                listener(self._function.__name__)
            return None
        target_context.refresh()
        return self._form.rebuild(target_context, pickle.loads(data))

    def save_overload(self, sig, data) -> None:
        if self._enabled:
            _write(self._path(sig), dumps(self._form.reduce(data)))


def _read(path: Path) -> bytes | None:
    """The file's content, or None where it is missing, damaged or not safe to trust."""
    try:
        if not _is_private(path.parent):
            warnings.warn(f"{path.parent} can be written by others: its machine code is not used", stacklevel=2)
            return None
        digest, data = (content := path.read_bytes())[:32], content[32:]
    except OSError:
        return None
    return data if hashlib.sha256(data).digest() == digest else None


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all, whoever writes at the same time."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(hashlib.sha256(data).digest() + data)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        warnings.warn(
            f"cannot keep machine code in {path.parent} ({error.strerror}): every start compiles again. "
            "Set MINILORA_CACHE to a folder that can be written.",
            stacklevel=2,
        )


def _is_private(folder: Path) -> bool:
    if sys.platform == "win32":
        return True
    status = folder.stat()
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
