"""Checkpoint names <-> packed arrays: what tensors a model has, how they lie in the arena, and the tables.

Every tensor that the architecture expects must be there with its shape, and every tensor that is there must be
known. q, k and v lie side by side; gate and up alternate in panels of 16 rows, so that one tile of the product
holds both.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minilora_kernels import pack
from minilora_kernels.formats import (
    BFLOAT16,
    BFLOAT16_INPUTS,
    FLOAT16,
    FLOAT32,
    GROUPS,
    INT4_MIN,
    INT8,
    common_format,
    group_of,
    is_float,
)
from minilora_kernels.memory import CACHE_LINE
from minilora_kernels.pack import BLOCK

from .checkpoint.base import Checkpoint
from .config import ModelConfig
from .errors import FormatError, UsageError
from .params import DTYPES

# Columns of the layers table: byte offsets of float32 vectors in the arena (-1: none), rows of the matrices
# table, and what the layer does.
(
    INPUT_NORM,
    POST_NORM,
    Q_NORM,
    K_NORM,
    QKV_BIAS,
    O_BIAS,
    GATE_UP_BIAS,
    DOWN_BIAS,
    QKV,
    QKV_PARTS,
    O,
    GATE_UP,
    DOWN,
    WINDOW,
    ROTARY,
) = range(15)
LAYER_WIDTH = 15

FLOAT_DTYPES = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16, "bfloat16+inputs": BFLOAT16_INPUTS}
DEFAULT_GROUP = 32

IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
EMBED, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


class Part(NamedTuple):
    """Rows first .. first + rows of a tensor."""

    name: str
    first: int
    rows: int


@dataclass(frozen=True)
class Vector:
    """A float32 vector of the arena: its parts one after the other, or taken in turn panel by panel."""

    parts: tuple[Part, ...]
    interleaved: bool = False

    @property
    def rows(self) -> int:
        """Numbers of a vector, rows of a matrix."""
        return sum(part.rows for part in self.parts)

    @property
    def bytes(self) -> int:
        """Bytes that it takes in the arena."""
        return 4 * self.rows


@dataclass(frozen=True)
class Matrix(Vector):
    """A packed matrix of the arena, its rows ordered like a Vector's numbers."""

    columns: int = 0
    format: int = FLOAT32
    group: int = 0

    @property
    def bytes(self) -> int:
        """Bytes that it takes in the arena."""
        return pack.packed_bytes(self.format, self.rows, self.columns, self.group)


# ---------------------------------------------------------------- what a model consists of


def layer_parts(config: ModelConfig, layer: int, suffix: str = "weight") -> dict[str, list[Part]]:
    """The tensors of a layer's four products: q k v, o, gate and up, down."""
    prefix, size, forward = f"model.layers.{layer}.", config.head_dim, config.intermediate_size
    q, kv = config.heads * size, config.kv_heads * size
    if config.fused:
        qkv, gate_up = f"{prefix}self_attn.qkv_proj.{suffix}", f"{prefix}mlp.gate_up_proj.{suffix}"
        first = [Part(qkv, 0, q), Part(qkv, q, kv), Part(qkv, q + kv, kv)]
        third = [Part(gate_up, 0, forward), Part(gate_up, forward, forward)]
    else:
        first = [Part(f"{prefix}self_attn.{n}_proj.{suffix}", 0, rows) for n, rows in (("q", q), ("k", kv), ("v", kv))]
        third = [Part(f"{prefix}mlp.{n}_proj.{suffix}", 0, forward) for n in ("gate", "up")]
    return {
        "qkv": first,
        "o": [Part(f"{prefix}self_attn.o_proj.{suffix}", 0, config.hidden_size)],
        "gate_up": third,
        "down": [Part(f"{prefix}mlp.down_proj.{suffix}", 0, config.hidden_size)],
    }


def columns_of(config: ModelConfig) -> dict[str, int]:
    """Inputs of a layer's four products."""
    return {
        "qkv": config.hidden_size,
        "o": config.heads * config.head_dim,
        "gate_up": config.hidden_size,
        "down": config.intermediate_size,
    }


def biases(config: ModelConfig) -> dict[str, bool]:
    """Which of a layer's products have a bias."""
    return {"qkv": config.qkv_bias, "o": config.o_bias, "gate_up": config.mlp_bias, "down": config.mlp_bias}


def layer_norms(config: ModelConfig, layer: int) -> dict[int, tuple[str, int]]:
    """Norm weights of a layer: column of the layers table -> (name, length)."""
    prefix = f"model.layers.{layer}."
    norms = {
        INPUT_NORM: (f"{prefix}input_layernorm.weight", config.hidden_size),
        POST_NORM: (f"{prefix}post_attention_layernorm.weight", config.hidden_size),
    }
    if config.qk_norm:
        norms[Q_NORM] = (f"{prefix}self_attn.q_norm.weight", config.head_dim)
        norms[K_NORM] = (f"{prefix}self_attn.k_norm.weight", config.head_dim)
    return norms


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this config must hold, with its shape."""
    shapes: dict[str, tuple[int, ...]] = {
        EMBED: (config.vocab_size, config.hidden_size),
        FINAL_NORM: (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, config.hidden_size)
    for layer in range(config.layers):
        shapes |= {name: (length,) for name, length in layer_norms(config, layer).values()}
        for product, columns in columns_of(config).items():
            for part in layer_parts(config, layer)[product]:
                shapes[part.name] = (max(part.first + part.rows, shapes.get(part.name, (0,))[0]), columns)
            for part in layer_parts(config, layer, "bias")[product] if biases(config)[product] else ():
                shapes[part.name] = (max(part.first + part.rows, shapes.get(part.name, (0,))[0]),)
    return shapes


def check_tensors(checkpoint: Checkpoint) -> None:
    """Raise FormatError where a tensor is missing, unknown or of the wrong shape."""
    expected, found = expected_shapes(checkpoint.config), checkpoint.names()
    known = set(expected) | ({HEAD} if checkpoint.config.tie_word_embeddings else set())
    if missing := sorted(set(expected) - found):
        raise FormatError(
            f"the checkpoint lacks {missing[0]!r}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
        )
    if unknown := sorted(name for name in found - known if not name.endswith(IGNORED_SUFFIXES)):
        raise FormatError(f"the checkpoint holds {unknown[0]!r}, which {checkpoint.config.architecture} does not have")
    for name, shape in expected.items():
        if tuple(checkpoint.shape(name)) != shape:
            raise FormatError(f"{name!r} has shape {tuple(checkpoint.shape(name))}, config.json asks for {shape}")


# ---------------------------------------------------------------- formats


@dataclass(frozen=True)
class Target:
    """The format that weights are brought into. dtype: one of DTYPES; group: one of GROUPS, for int8 and int4.

    A matrix whose columns the group does not divide takes the next smaller one that does.
    """

    dtype: str = "auto"
    group: int = DEFAULT_GROUP

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r} is not known", f"Known: {', '.join(DTYPES)}.")
        if self.group not in GROUPS:
            raise UsageError(f"group size {self.group} is not known", f"Known: {', '.join(map(str, GROUPS))}.")

    @property
    def key(self) -> tuple[str, int]:
        """What the packed bytes depend on: the group counts for int8 and int4 only."""
        return self.dtype, self.group if self.dtype in ("int8", "int4") else 0

    def of(self, natural: tuple[int, int], columns: int, is_head: bool) -> tuple[int, int]:
        """(format, group) for a matrix, from the `natural` ones in which the checkpoint holds it."""
        if self.dtype == "auto":
            return natural
        if self.dtype in FLOAT_DTYPES:
            return FLOAT_DTYPES[self.dtype], group_of(FLOAT_DTYPES[self.dtype], 0)
        # Columns are a multiple of 16, see config.py.
        group = max(g for g in GROUPS if g <= self.group and columns % g == 0)
        # The embedding and the head lose most by 4 bits: they keep 8.
        return (INT8, group) if self.dtype == "int8" or is_head else (INT4_MIN, group)


# ---------------------------------------------------------------- the plan


class Plan:
    """Where everything goes: matrices and vectors in arena order, and the tables that the step reads."""

    def __init__(self, checkpoint: Checkpoint, target: Target):
        check_tensors(checkpoint)
        self.checkpoint, self.target, self.config = checkpoint, target, checkpoint.config
        self.items: list[tuple[int, Vector]] = []
        self.size = 0
        self._rows: list[list[int]] = []
        self.layers = np.full((self.config.layers, LAYER_WIDTH), -1, np.int64)
        self.embed = self._matrix([Part(EMBED, 0, self.config.vocab_size)], self.config.hidden_size, is_head=True)
        for layer in range(self.config.layers):
            self._layer(layer)
        self.final_norm = self._vector([Part(FINAL_NORM, 0, self.config.hidden_size)])
        self.head = self.embed
        if not self.config.tie_word_embeddings:
            self.head = self._matrix([Part(HEAD, 0, self.config.vocab_size)], self.config.hidden_size, is_head=True)
        self.matrices = np.array(self._rows, np.int64)

    def _layer(self, layer: int) -> None:
        config, row = self.config, self.layers[layer]
        parts, columns = layer_parts(config, layer), columns_of(config)
        for column, (name, length) in layer_norms(config, layer).items():
            row[column] = self._vector([Part(name, 0, length)])
        for column, product in ((QKV_BIAS, "qkv"), (O_BIAS, "o"), (GATE_UP_BIAS, "gate_up"), (DOWN_BIAS, "down")):
            if biases(config)[product]:
                row[column] = self._vector(layer_parts(config, layer, "bias")[product], product == "gate_up")
        row[QKV] = len(self._rows)
        # Their inputs are quantised once.
        group = self._format(parts["qkv"], columns["qkv"])[1]
        for run in self._runs(parts["qkv"], columns["qkv"]):
            self._matrix(run, columns["qkv"], group=group)
        row[QKV_PARTS] = len(self._rows) - row[QKV]
        row[O] = self._matrix(parts["o"], columns["o"])
        row[GATE_UP] = self._matrix(parts["gate_up"], columns["gate_up"], interleaved=True)
        row[DOWN] = self._matrix(parts["down"], columns["down"])
        row[WINDOW], row[ROTARY] = config.windows[layer], config.rotary[layer]

    def _format(self, parts: list[Part], columns: int, is_head: bool = False) -> tuple[int, int]:
        stored = [(self.checkpoint.format(part.name), self.checkpoint.group(part.name)) for part in parts]
        chosen = [self.target.of(natural, columns, is_head) for natural in stored]
        fmt = common_format({fmt for fmt, _ in chosen})
        return fmt, group_of(fmt, min(group for _, group in chosen))

    def _runs(self, parts: list[Part], columns: int) -> Iterator[list[Part]]:
        """q, k and v: one matrix where they can share a format, else one for each format (if blocks allow it)."""
        formats = [self._format([part], columns)[0] for part in parts]
        ints = not any(is_float(fmt) for fmt in formats)
        if self.config.head_dim % BLOCK or not ints or len(set(formats)) == 1:
            yield parts
            return
        run: list[Part] = []
        for i, part in enumerate(parts):
            run.append(part)
            if i + 1 == len(parts) or formats[i + 1] != formats[i]:
                yield run
                run = []

    def _matrix(
        self, parts: list[Part], columns: int, interleaved: bool = False, is_head: bool = False, group: int = 0
    ) -> int:
        fmt, own = self._format(parts, columns, is_head)
        group = group or own
        offset = self._place(matrix := Matrix(tuple(parts), interleaved, columns, fmt, group))
        self._rows.append(pack.table_row(fmt, matrix.rows, columns, group, offset))
        return len(self._rows) - 1

    def _vector(self, parts: list[Part], interleaved: bool = False) -> int:
        return self._place(Vector(tuple(parts), interleaved))

    def _place(self, item: Vector) -> int:
        offset = self.size
        self.items.append((offset, item))
        self.size = -(-(offset + item.bytes) // CACHE_LINE) * CACHE_LINE
        return offset
