"""GGUF files, versions 2 and 3: header, metadata and tensor table, with nothing taken on trust.

Every count, length and offset is checked against the bytes that are really there before it is used, so a lying
file costs neither memory nor time. Format: the GGUF specification of the ggml project.
"""

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError, UnsupportedError
from .ggml import BLOCK_TYPES, BlockType

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
LARGEST_ALIGNMENT = 1 << 16
LONGEST_STRING = 1 << 24
LONGEST_NAME = 256

_SCALARS = {
    0: ("<B", 1),
    1: ("<b", 1),
    2: ("<H", 2),
    3: ("<h", 2),
    4: ("<I", 4),
    5: ("<i", 4),
    6: ("<f", 4),
    10: ("<Q", 8),
    11: ("<q", 8),
    12: ("<d", 8),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9

# The fewest bytes of a metadata entry (length, one character, type, one byte) and of a tensor's entry.
_SMALLEST_ENTRY = 8 + 1 + 4 + 1
_SMALLEST_TENSOR = 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: shape as in NumPy (rows first), where its bytes start in the file, and how many they are."""

    name: str
    shape: tuple[int, ...]
    kind: BlockType
    start: int
    size: int


class Gguf:
    """A GGUF file: `metadata` (key -> value; arrays are lists or NumPy arrays) and `tensors` by name.

    Raises FormatError, naming file, offset and field, where the file breaks a rule.
    """

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise FormatError(f"{path.name} is empty")
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = _Reader(self._bytes, path.name)
        tensor_count, entry_count = reader.header()
        self.metadata: dict[str, Any] = reader.metadata(entry_count)
        self.tensors = reader.tensors(tensor_count, self._alignment())

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(value, int) or value % 8 or not 8 <= value <= LARGEST_ALIGNMENT or value & (value - 1):
            raise FormatError(
                f"{self.path.name}: general.alignment {value!r} is not a power of two from 8 to {LARGEST_ALIGNMENT}"
            )
        return value

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A metadata value of the given type, or `default` where the key is missing. Raises FormatError."""
        value = self.metadata.get(key, default)
        wrong = isinstance(value, bool) and kind is not bool
        if value is not None and (wrong or not isinstance(value, kind)):
            raise FormatError(f"{self.path.name}: {key} has a value of the wrong type")
        return value

    def rows(self, tensor: GgufTensor) -> np.ndarray:
        """The raw bytes of a tensor as uint8 [rows, bytes of a row], a view of the file."""
        rows = math.prod(tensor.shape[:-1])
        raw = np.frombuffer(self._bytes, np.uint8, tensor.size, tensor.start)
        return raw.reshape(rows, tensor.size // rows)


class _Reader:
    def __init__(self, data: mmap.mmap, name: str):
        self.data, self.name, self.at = data, name, 0

    def fail(self, field: str, why: str) -> FormatError:
        return FormatError(f"{self.name}: {field} at byte {self.at}: {why}", "The file is damaged or not a GGUF file.")

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int, field: str) -> int:
        """Move past `count` bytes that must be there; returns where they start."""
        if count > self.left:
            raise self.fail(field, f"needs {count} bytes, {self.left} are left")
        start, self.at = self.at, self.at + count
        return start

    def scalar(self, code: str, size: int, field: str) -> Any:
        return struct.unpack_from(code, self.data, self.take(size, field))[0]

    def count(self, smallest: int, field: str) -> int:
        """A count of things of at least `smallest` bytes each, all of which must fit."""
        value = self.scalar("<Q", 8, field)
        if value > self.left // smallest:
            raise self.fail(field, f"{value} entries do not fit into {self.left} bytes")
        return value

    def string(self, field: str, longest: int = LONGEST_STRING) -> str:
        length = self.scalar("<Q", 8, field)
        if length > longest:
            raise self.fail(field, f"a text of {length} bytes")
        start = self.take(length, field)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError:
            raise self.fail(field, "not valid UTF-8") from None

    def header(self) -> tuple[int, int]:
        """(number of tensors, number of metadata entries)."""
        if self.data[self.take(4, "magic") : 4] != MAGIC:
            raise FormatError(f"{self.name} is not a GGUF file: it does not begin with GGUF")
        version = self.scalar("<I", 4, "version")
        if version not in (2, 3):
            raise UnsupportedError(f"{self.name}: GGUF version {version}, known are 2 and 3")
        tensors = self.count(_SMALLEST_TENSOR, "tensor count")
        return tensors, self.count(_SMALLEST_ENTRY, "metadata count")

    def metadata(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.string("metadata key", LONGEST_NAME)
            if not key or key in found:
                raise self.fail("metadata key", f"{key!r} is empty or there twice")
            found[key] = self.value(self.scalar("<I", 4, key), key)
        return found

    def value(self, kind: int, field: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(*_SCALARS[kind], field)
        if kind == _BOOL:
            return self.flag(field)
        if kind == _STRING:
            return self.string(field)
        if kind == _ARRAY:
            return self.array(field)
        raise self.fail(field, f"unknown type {kind}")

    def flag(self, field: str) -> bool:
        value = self.scalar("<B", 1, field)
        if value > 1:
            raise self.fail(field, f"{value} is neither true nor false")
        return value == 1

    def array(self, field: str) -> Any:
        kind = self.scalar("<I", 4, field)
        if kind in _SCALARS:
            code, size = _SCALARS[kind]
            count = self.count(size, field)
            return np.frombuffer(self.data, np.dtype(code), count, self.take(count * size, field)).copy()
        readers: dict[int, tuple[int, Callable[[str], Any]]] = {_BOOL: (1, self.flag), _STRING: (8, self.string)}
        if kind not in readers:
            raise self.fail(field, f"an array of type {kind}")
        smallest, read = readers[kind]
        return [read(field) for _ in range(self.count(smallest, field))]

    def tensors(self, count: int, alignment: int) -> dict[str, GgufTensor]:
        entries = [self.tensor_entry() for _ in range(count)]
        base = -(-self.at // alignment) * alignment
        found: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in entries:
            size = math.prod(shape) // kind.values * kind.size
            if offset % alignment or base + offset + size > len(self.data):
                raise self.fail(
                    f"tensor {name!r}", f"offset {offset} and {size} bytes reach beyond the file or are not aligned"
                )
            if name in found:
                raise self.fail(f"tensor {name!r}", "there twice")
            found[name] = GgufTensor(name, shape, kind, base + offset, size)
        self.check_apart(list(found.values()))
        return found

    def tensor_entry(self) -> tuple[str, tuple[int, ...], BlockType, int]:
        name = self.string("tensor name", LONGEST_NAME)
        dimensions = self.scalar("<I", 4, f"dimensions of {name!r}")
        if not 1 <= dimensions <= 4:
            raise self.fail(f"tensor {name!r}", f"{dimensions} dimensions")
        shape = tuple(self.scalar("<Q", 8, f"shape of {name!r}") for _ in range(dimensions))[::-1]
        code = self.scalar("<I", 4, f"type of {name!r}")
        if code not in BLOCK_TYPES:
            raise UnsupportedError(
                f"{self.name}: tensor {name!r} has ggml type {code}",
                f"Known: {', '.join(k.name for k in BLOCK_TYPES.values())}.",
            )
        kind = BLOCK_TYPES[code]
        if min(shape) < 1 or math.prod(shape) > len(self.data) * kind.values // kind.size or shape[-1] % kind.values:
            raise self.fail(f"tensor {name!r}", f"impossible shape {shape} for {kind.name}")
        return name, shape, kind, self.scalar("<Q", 8, f"offset of {name!r}")

    def check_apart(self, tensors: list[GgufTensor]) -> None:
        tensors.sort(key=lambda tensor: tensor.start)
        for one, other in pairwise(tensors):
            if one.start + one.size > other.start:
                raise self.fail(f"tensor {other.name!r}", f"overlaps {one.name!r}")
