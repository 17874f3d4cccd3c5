"""Hugging Face folders: config.json, tokenizer.json, and one or several safetensors files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ModelConfig
from ..errors import FormatError, NotFoundError, UnsupportedError
from ..files import read_json
from ..tokenizer import TokenizerFiles
from .safetensors import TensorFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class FolderCheckpoint:
    """A checkpoint in a folder. Raises NotFoundError where a file is missing, FormatError where one is damaged."""

    def __init__(self, path: Path):
        self.path = path
        self.config = ModelConfig.from_dict(read_json(path / "config.json"))
        generation = path / "generation_config.json"
        self.generation: Mapping[str, Any] = read_json(generation) if generation.exists() else {}
        self._where: dict[str, TensorFile] = {}
        for file in self._tensor_files():
            tensors = TensorFile(file)
            if twice := tensors.tensors.keys() & self._where.keys():
                raise FormatError(f"tensor {min(twice)!r} is in more than one file of {path}")
            self._where |= dict.fromkeys(tensors.tensors, tensors)

    def _tensor_files(self) -> list[Path]:
        # As transformers has it: beside a single file, an index and its shards are leftovers.
        if (self.path / SINGLE).exists():
            return [self.path / SINGLE]
        if (self.path / INDEX).exists():
            places = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
                raise FormatError(f"{INDEX} has no weight_map from names to files")
            return [self._inside(name) for name in sorted(set(places.values()))]
        if list(self.path.glob("*.bin")):
            raise UnsupportedError(
                f"{self.path} holds its weights in .bin files, which can run code when they are read",
                "Convert them to safetensors, for example with transformers' save_pretrained.",
            )
        raise NotFoundError(f"{self.path} has neither {SINGLE} nor {INDEX}")

    def _inside(self, name: str) -> Path:
        """A file named by the index, which must lie in the folder itself."""
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise FormatError(f"{INDEX} names {name!r}, which is not a safetensors file of its own folder")
        if not (self.path / name).exists():
            raise NotFoundError(f"{self.path / name} is missing", f"{INDEX} names it; fetch the checkpoint again.")
        return self.path / name

    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._where[name].tensors[name].shape

    def format(self, name: str) -> int:
        return self._where[name].format(name)

    def group(self, name: str) -> int:
        return 0

    def read(self, name: str, rows: slice) -> np.ndarray:
        return self._where[name].read(name, rows)

    def read_float(self, name: str, rows: slice) -> np.ndarray:
        return self._where[name].read(name, rows)

    def tokenizer(self) -> TokenizerFiles:
        return TokenizerFiles.from_folder(self.path)
