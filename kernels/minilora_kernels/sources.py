"""What machine code is made from: a key that changes whenever the code might.

The kernel sources themselves are in every key, see `code_files`; here is the rest, for kernels of other packages.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from numbers import Number
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from numba import types


def source_key(function: Callable) -> str:
    """A name for a function's file, for those of the kernels that it calls, and for the constants that they name.

    A kernel calls what it, or a function inside it, names as a global or holds in its closure, or reads from a module
    that it names so.
    """
    parts: set[str] = set()
    seen: set[Callable] = set()
    waiting = [function]
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            parts.add(_file_digest(inspect.getfile(one)))
            # The file may have changed since it was imported.
            parts.add(repr(_loaded(one.__code__)))
            for name, value in _named(one):
                if called := getattr(value, "py_func", None):
                    waiting.append(called)
                elif isinstance(value, Number | str):
                    parts.add(repr((name, value)))
                elif fields := getattr(value, "_fields", None):
                    parts.add(repr((name, fields)))
    return hashlib.sha256(repr(sorted(parts)).encode()).hexdigest()


def _named(function: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of what a function's code names as a global and of its closure, tuples item by item; and of what
    the modules among these hold under any name in the code."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    codes, names, modules = [function.__code__], set[str](), set[ModuleType]()
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        names.update(code.co_names)
    values = list(zip(function.__code__.co_freevars, cells, strict=True))
    values += [(name, function.__globals__[name]) for name in names & function.__globals__.keys()]
    while values:
        name, value = values.pop()
        if isinstance(value, tuple):
            values += [(f"{name}.{i}", item) for i, item in enumerate(value)]
        elif isinstance(value, ModuleType) and value not in modules:
            modules.add(value)
            values += [(f"{value.__name__}.{inner}", vars(value)[inner]) for inner in names & vars(value).keys()]
        yield name, value


def _loaded(code: CodeType) -> tuple[Any, ...]:
    """What a function does, as it was imported: the same in every process."""
    constants = [_loaded(one) if isinstance(one, CodeType) else _spelled(one) for one in code.co_consts]
    return code.co_code, code.co_names, code.co_varnames, code.co_freevars, constants


def _spelled(constant: Any) -> str:
    """A constant; the order of a set is another in each process."""
    return repr(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant)


@cache
def _file_digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def spelled(kind: Any) -> str:
    """The name of a Numba type with the names of its fields, which Numba leaves out."""
    if isinstance(kind, types.BaseTuple):
        parts = [spelled(part) for part in kind.types]
        names = getattr(kind, "fields", [""] * len(parts))
        inside = ", ".join(f"{name}: {part}" for name, part in zip(names, parts, strict=True))
        return f"{type(kind).__name__}({inside})"
    return str(kind)
