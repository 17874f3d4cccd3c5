"""Checkpoint names <-> packed arrays: what tensors a model has, how they lie in the arena, and the tables.

Every tensor that the architecture expects must be there with its shape, and every tensor that is there must be
known. q, k and v lie side by side; gate and up alternate in panels of 16 rows, so that one tile of the product
holds both.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minilora_kernels import pack
from minilora_kernels.memory import CACHE_LINE, aligned_zeros
from minilora_kernels.pack import BLOCK, FLOAT32, FORMAT, GROUPS, INT4, INT8, PANEL, Quantized
from minilora_kernels.quantize import quantize

from .checkpoint.base import Checkpoint
from .config import ModelConfig
from .errors import FormatError, UsageError

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

CHUNK_ROWS = 4096

DTYPES = ("auto", "float32", "float16", "bfloat16", "int8", "int4")
FLOAT_DTYPES = {"float32": pack.FLOAT32, "float16": pack.FLOAT16, "bfloat16": pack.BFLOAT16}
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
    """The format that weights are brought into. dtype: one of DTYPES; group: 32, 64 or 128, for int8 and int4."""

    dtype: str = "auto"
    group: int = DEFAULT_GROUP

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r} is not known", f"Known: {', '.join(DTYPES)}.")
        if self.group not in GROUPS:
            raise UsageError(f"group size {self.group} is not known", f"Known: {', '.join(map(str, GROUPS))}.")

    def of(self, natural: int, columns: int, is_head: bool) -> tuple[int, int]:
        """(format, group) for a matrix that the checkpoint holds in format `natural`."""
        if self.dtype == "auto":
            return natural, 0 if pack.is_float(natural) else 32
        if self.dtype in FLOAT_DTYPES:
            return FLOAT_DTYPES[self.dtype], 0
        group = max(g for g in GROUPS if g <= self.group and columns % g == 0)
        # The embedding and the head lose most by 4 bits: they keep 8.
        return (INT8, group) if self.dtype == "int8" or is_head else (pack.INT4_MIN, group)


def common_format(formats: set[int]) -> int:
    """The smallest format that holds weights of all these formats without a new rounding."""
    if len(formats) == 1:
        return next(iter(formats))
    if any(pack.is_float(fmt) for fmt in formats):
        return FLOAT32
    wide, minimum = max(map(pack.bits, formats)) == 8, any(map(pack.has_minimum, formats))
    return (pack.INT8_MIN if minimum else INT8) if wide else (pack.INT4_MIN if minimum else INT4)


def convert(matrix: Quantized, fmt: int) -> Quantized:
    """The same weights in a format that common_format allows."""
    if matrix.format == fmt:
        return matrix
    zero = pack.zero(matrix.format)
    if pack.has_minimum(fmt) and matrix.minima is None:
        return Quantized(
            matrix.values, matrix.scales, (-zero * matrix.scales.astype(np.float32)).astype(np.float16), pack.bits(fmt)
        )
    shift = np.uint8(pack.zero(fmt) - zero)
    return Quantized(matrix.values + shift, matrix.scales, matrix.minima, pack.bits(fmt))


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
        for group in self._runs(parts["qkv"], columns["qkv"]):
            self._matrix(group, columns["qkv"])
        row[QKV_PARTS] = len(self._rows) - row[QKV]
        row[O] = self._matrix(parts["o"], columns["o"])
        row[GATE_UP] = self._matrix(parts["gate_up"], columns["gate_up"], interleaved=True)
        row[DOWN] = self._matrix(parts["down"], columns["down"])
        row[WINDOW], row[ROTARY] = config.windows[layer], config.rotary[layer]

    def _format(self, parts: list[Part], columns: int, is_head: bool = False) -> tuple[int, int]:
        chosen = [self.target.of(self.checkpoint.format(part.name), columns, is_head) for part in parts]
        fmt = common_format({fmt for fmt, _ in chosen})
        return fmt, 0 if pack.is_float(fmt) else max(group for _, group in chosen)

    def _runs(self, parts: list[Part], columns: int) -> Iterator[list[Part]]:
        """q, k and v: one matrix where they can share a format, else one for each format (if blocks allow it)."""
        formats = [self._format([part], columns)[0] for part in parts]
        ints = not any(pack.is_float(fmt) for fmt in formats)
        if self.config.head_dim % BLOCK or not ints or len(set(formats)) == 1:
            yield parts
            return
        run: list[Part] = []
        for i, part in enumerate(parts):
            run.append(part)
            if i + 1 == len(parts) or formats[i + 1] != formats[i]:
                yield run
                run = []

    def _matrix(self, parts: list[Part], columns: int, interleaved: bool = False, is_head: bool = False) -> int:
        fmt, group = self._format(parts, columns, is_head)
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


# ---------------------------------------------------------------- filling the arena


class _Piece(NamedTuple):
    """Rows first .. end of every part, to be packed together."""

    item: Vector
    first: int
    end: int
    parts: tuple[Part, ...]


def _pieces(item: Vector) -> Iterator[_Piece]:
    """Cut a matrix into pieces that are packed by themselves, each a few thousand rows."""
    if item.interleaved:
        rows = item.parts[0].rows
        for first in range(0, rows, CHUNK_ROWS):
            yield _Piece(item, first, min(first + CHUNK_ROWS, rows), item.parts)
    elif all(part.rows % BLOCK == 0 for part in item.parts) or len(item.parts) == 1:
        for part in item.parts:
            for first in range(0, part.rows, CHUNK_ROWS):
                yield _Piece(item, first, min(first + CHUNK_ROWS, part.rows), (part,))
    else:
        yield _Piece(item, 0, max(part.rows for part in item.parts), item.parts)


def _interleave(x: np.ndarray) -> np.ndarray:
    """Two stacked halves taken in turn, 16 rows at a time."""
    return x.reshape(2, -1, PANEL, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)


def _arrange(arrays: list[np.ndarray], interleaved: bool) -> np.ndarray:
    stacked = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return _interleave(stacked) if interleaved else stacked


def _check_finite(name: str, *arrays: np.ndarray | None) -> None:
    for array in arrays:
        if array is not None and not np.isfinite(array).all():
            raise FormatError(f"{name!r} holds a number that is not finite")


class Packer:
    """Turns a plan's tensors into the bytes of the arena."""

    def __init__(self, plan: Plan):
        self._checkpoint, self._plan = plan.checkpoint, plan

    def chunks(self) -> Iterator[np.ndarray]:
        """The arena from its first byte to its last, as uint8 arrays; packed on several threads ahead of use."""
        at = 0
        with ThreadPoolExecutor() as pool:
            for offset, pieces in self._plan_pieces():
                yield np.zeros(offset - at, np.uint8)
                at = offset
                for data in _ahead(pool, self._pack, pieces):
                    yield data
                    at += len(data)
        yield np.zeros(self._plan.size - at, np.uint8)

    def _plan_pieces(self) -> Iterator[tuple[int, Iterator[_Piece]]]:
        for offset, item in self._plan.items:
            yield offset, _pieces(item)

    def _pack(self, piece: _Piece) -> np.ndarray:
        if not isinstance(piece.item, Matrix):
            return np.ascontiguousarray(self._floats(piece)).view(np.uint8)
        if pack.is_float(piece.item.format):
            return pack.pack_float(self._floats(piece), piece.item.format)
        return pack.pack_quantized(self._quantized(piece))

    def _floats(self, piece: _Piece) -> np.ndarray:
        arrays = []
        for part, rows in self._rows(piece):
            arrays.append(self._checkpoint.read_float(part.name, rows))
            _check_finite(part.name, arrays[-1])
        return _arrange(arrays, piece.item.interleaved)

    def _rows(self, piece: _Piece) -> Iterator[tuple[Part, slice]]:
        for part in piece.parts:
            yield part, slice(part.first + piece.first, part.first + min(piece.end, part.rows))

    def _quantized(self, piece: _Piece) -> Quantized:
        item = piece.item
        assert isinstance(item, Matrix)
        done = [self._quantize(part.name, rows, item) for part, rows in self._rows(piece)]
        values = _arrange([q.values for q in done], item.interleaved)
        scales = _arrange([q.scales for q in done], item.interleaved)
        minima = [q.minima for q in done if q.minima is not None]
        return Quantized(values, scales, _arrange(minima, item.interleaved) if minima else None, pack.bits(item.format))

    def _quantize(self, name: str, rows: slice, item: Matrix) -> Quantized:
        """Rows of a tensor in the item's format: as they are stored where that is possible."""
        if self._plan.target.dtype == "auto":
            stored = self._checkpoint.read(name, rows)
            if isinstance(stored, Quantized):
                _check_finite(name, stored.scales, stored.minima)
                return convert(stored, item.format)
        weights = self._checkpoint.read_float(name, rows)
        _check_finite(name, weights)
        return quantize(weights, pack.bits(item.format), item.group, pack.has_minimum(item.format))


def _ahead(
    pool: ThreadPoolExecutor, function: Callable[[_Piece], np.ndarray], pieces: Iterator[_Piece]
) -> Iterator[np.ndarray]:
    """function of each piece, in order, a few of them under way at a time."""
    waiting: deque[Future[np.ndarray]] = deque()
    for piece in pieces:
        waiting.append(pool.submit(function, piece))
        if len(waiting) > 4:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


# ---------------------------------------------------------------- the result


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


def pack_in_memory(plan: Plan) -> Weights:
    """Pack a model without writing it anywhere."""
    arena, at = aligned_zeros(plan.size), 0
    for chunk in Packer(plan).chunks():
        arena[at : at + len(chunk)] = chunk
        at += len(chunk)
    return Weights(plan.config, arena, plan.matrices, plan.layers, plan.embed, plan.head, plan.final_norm)


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
    """The inverse of _arrange; parts of one fused tensor are joined again."""
    if interleaved:
        stacked = stacked.reshape(-1, 2, PANEL, *stacked.shape[1:]).swapaxes(0, 1).reshape(stacked.shape)
    names, at = dict.fromkeys(part.name for part in parts), 0
    for name in names:
        rows = sum(part.rows for part in parts if part.name == name)
        yield name, stacked[at : at + rows]
        at += rows
