"""safetensors files: checked by the safetensors library, then read in place.

The library's NumPy side has no bfloat16, so the bytes come from a memory map of our own, at the offsets that the
library has found consistent.
"""

import json
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from minilora_kernels.convert import widen_float16
from minilora_kernels.floats import widen_bfloat16
from minilora_kernels.formats import BFLOAT16, FLOAT16, FLOAT32

from ..errors import FormatError, UnsupportedError

FORMATS = {"F32": FLOAT32, "F16": FLOAT16, "BF16": BFLOAT16}
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
MOST_TENSORS = 200_000


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: dtype as safetensors names it, start in bytes from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int


class TensorFile:
    """One .safetensors file. Raises FormatError where it breaks the format's rules.

    in_memory: read at once instead of mapped.
    """

    def __init__(self, path: Path, in_memory: bool = False):
        self.path = path
        try:
            with safe_open(path, framework="numpy"):
                pass
        except (SafetensorError, ValueError) as error:
            raise FormatError(f"{path.name} is damaged or not a safetensors file: {error}") from None
        self._bytes: bytes | mmap.mmap
        if in_memory:
            self._bytes = path.read_bytes()
        else:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self.tensors = self._listed()
        except (ValueError, LookupError, TypeError, AttributeError):
            raise FormatError(f"{path.name} was changed while it was read", "Load it again.") from None
        if len(self.tensors) > MOST_TENSORS:
            raise FormatError(f"{path.name} lists {len(self.tensors)} tensors, at most {MOST_TENSORS} are read")

    def _listed(self) -> dict[str, StoredTensor]:
        length = int.from_bytes(self._bytes[:8], "little")
        header = json.loads(self._bytes[8 : 8 + length])
        header.pop("__metadata__", None)
        return {
            name: StoredTensor(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
        }

    def format(self, name: str) -> int:
        """The format of a tensor's numbers. Raises UnsupportedError for integers and the like."""
        dtype = self.tensors[name].dtype
        if dtype not in FORMATS:
            raise UnsupportedError(f"{self.path.name}: tensor {name!r} is {dtype}, known are {', '.join(FORMATS)}")
        return FORMATS[dtype]

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Rows of a tensor (numbers, if it has one dimension) as float32."""
        self.format(name)
        tensor = self.tensors[name]
        count = int(np.prod(tensor.shape, dtype=np.int64))
        try:
            whole = np.frombuffer(self._bytes, _DTYPES[tensor.dtype], count, tensor.start)
        except ValueError:
            raise FormatError(f"{self.path.name} was changed while it was read", "Load it again.") from None
        raw = whole.reshape(tensor.shape)[rows]
        if tensor.dtype == "BF16":
            return widen_bfloat16(raw)
        return widen_float16(raw.view(np.uint16)) if tensor.dtype == "F16" else raw.astype(np.float32)
