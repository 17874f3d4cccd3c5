"""What every kind of checkpoint offers, in Hugging Face's names."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from minilora_kernels.quantized import Quantized

from ..config import ModelConfig
from ..tokenizer import TokenizerFiles


class Checkpoint(Protocol):
    """A model as it lies on disk. config: its shape; generation: the content of generation_config.json."""

    config: ModelConfig
    generation: Mapping[str, Any]

    def names(self) -> set[str]:
        """Names of all tensors, as in a Hugging Face checkpoint."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, rows first."""
        ...

    def format(self, name: str) -> int:
        """The format that holds the tensor as it is."""
        ...

    def group(self, name: str) -> int:
        """How many columns of the tensor share a scale; 0 of floating-point numbers."""
        ...

    def read(self, name: str, rows: slice) -> Quantized | np.ndarray:
        """Rows of a matrix: Quantized where `format` is an integer format, else float32."""
        ...

    def read_float(self, name: str, rows: slice) -> np.ndarray:
        """Rows of a matrix, or a vector, as float32, exactly as stored."""
        ...

    def tokenizer(self) -> TokenizerFiles:
        """The tokenizer's definition."""
        ...
