"""A packed model: the arena, the tables, and the way back to tensors under their names."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minilora_kernels import pack
from minilora_kernels.pack import BLOCK, FORMAT, PANEL

from .config import ModelConfig
from .plan import (
    DOWN,
    DOWN_BIAS,
    EMBED,
    FINAL_NORM,
    GATE_UP,
    GATE_UP_BIAS,
    HEAD,
    O_BIAS,
    QKV,
    QKV_BIAS,
    QKV_PARTS,
    O,
    Part,
    layer_norms,
    layer_parts,
)


class Network(NamedTuple):
    """A model's weights as the step reads them.

    arena: uint8; matrices: int64 [n, 6]; layers: int64 [layers, 15]; embed, head: rows of matrices; final_norm:
    byte offset; cos, sin: float32 rotation tables, `half` numbers for each position.
    """

    arena: np.ndarray
    matrices: np.ndarray
    layers: np.ndarray
    embed: int
    head: int
    final_norm: int
    cos: np.ndarray
    sin: np.ndarray
    half: int


@dataclass(frozen=True)
class Weights:
    """A packed model: its config, the arena and the tables, see Network."""

    config: ModelConfig
    arena: np.ndarray
    matrices: np.ndarray
    layers: np.ndarray
    embed: int
    head: int
    final_norm: int

    @property
    def formats(self) -> tuple[int, ...]:
        """Formats of the matrices, each once, most bytes first."""
        found = {int(fmt) for fmt in self.matrices[:, FORMAT]}
        return tuple(sorted(found, key=lambda fmt: -self.bytes_of(fmt)))

    def bytes_of(self, fmt: int) -> int:
        """Bytes of all matrices of a format."""
        rows = self.matrices[self.matrices[:, FORMAT] == fmt]
        return int((rows[:, pack.ROWS] // BLOCK * rows[:, pack.BLOCK_BYTES]).sum())

    def rows(self, matrix: int, block: int) -> np.ndarray:
        """Block `block` of a matrix as float32 [32, columns]."""
        row = self.matrices[matrix].copy()
        row[pack.OFFSET] += block * row[pack.BLOCK_BYTES]
        row[pack.ROWS] = BLOCK
        return pack.unpack(self.arena, row)

    def network(self, length: int) -> Network:
        """The arrays for texts of up to `length` tokens."""
        cos, sin = self.config.rope.tables(length)
        return Network(
            self.arena,
            self.matrices,
            self.layers,
            self.embed,
            self.head,
            self.final_norm,
            cos.reshape(-1),
            sin.reshape(-1),
            self.config.rope.dim // 2,
        )

    def floats(self) -> dict[str, np.ndarray]:
        """Every tensor as float32 under its Hugging Face name: what the packed numbers stand for."""
        return dict(_unpack_all(self))


def _unpack_all(weights: Weights) -> Iterator[tuple[str, np.ndarray]]:
    config = weights.config

    def vector(offset: int, length: int) -> np.ndarray:
        return weights.arena[offset : offset + 4 * length].view(np.float32).copy()

    def matrix(row: int) -> np.ndarray:
        return pack.unpack(weights.arena, weights.matrices[row])

    yield EMBED, matrix(weights.embed)[: config.vocab_size]
    yield HEAD, matrix(weights.head)[: config.vocab_size]
    yield FINAL_NORM, vector(weights.final_norm, config.hidden_size)
    for layer, row in enumerate(weights.layers):
        for column, (name, length) in layer_norms(config, layer).items():
            yield name, vector(row[column], length)
        qkv = np.concatenate([matrix(row[QKV] + part) for part in range(row[QKV_PARTS])])
        products = {"qkv": qkv, "o": matrix(row[O]), "gate_up": matrix(row[GATE_UP]), "down": matrix(row[DOWN])}
        vectors = {"qkv": QKV_BIAS, "o": O_BIAS, "gate_up": GATE_UP_BIAS, "down": DOWN_BIAS}
        for product, stacked in products.items():
            yield from _split(layer_parts(config, layer)[product], stacked, product == "gate_up")
            if row[vectors[product]] >= 0:
                parts = layer_parts(config, layer, "bias")[product]
                yield from _split(
                    parts, vector(row[vectors[product]], sum(p.rows for p in parts)), product == "gate_up"
                )


def _split(parts: list[Part], stacked: np.ndarray, interleaved: bool) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of packer._arrange; parts of one fused tensor are joined again."""
    if interleaved:
        stacked = stacked.reshape(-1, 2, PANEL, *stacked.shape[1:]).swapaxes(0, 1).reshape(stacked.shape)
    names, at = dict.fromkeys(part.name for part in parts), 0
    for name in names:
        rows = sum(part.rows for part in parts if part.name == name)
        yield name, stacked[at : at + rows]
        at += rows
