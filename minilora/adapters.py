"""LoRA adapters: an Adapter of plain arrays, and how the step reads it once it is packed."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minilora_kernels.formats import INT8
from minilora_kernels.lora_pack import pack_expand, pack_gather, pack_shrink, padded_rank, panel_bytes
from minilora_kernels.memory import CACHE_LINE
from minilora_kernels.pack import PANEL

from .config import ModelConfig
from .errors import AdapterError

# Rows of A are scaled by at most two to this power: B must not overflow.
LARGEST_SHIFT = 32

# What adapters shrink: the inputs of a layer's products; each serves the matrices that read it.
QKV_IN, O_IN, GATE_UP_IN, DOWN_IN = range(4)
# What they expand into.
Q_OUT, K_OUT, V_OUT, O_OUT, GATE_OUT, UP_OUT, DOWN_OUT = range(7)

OUTPUTS_OF = {QKV_IN: (Q_OUT, K_OUT, V_OUT), O_IN: (O_OUT,), GATE_UP_IN: (GATE_OUT, UP_OUT), DOWN_IN: (DOWN_OUT,)}
MODULES: dict[str, tuple[int, ...]] = {
    "self_attn.q_proj": (Q_OUT,),
    "self_attn.k_proj": (K_OUT,),
    "self_attn.v_proj": (V_OUT,),
    "self_attn.o_proj": (O_OUT,),
    "mlp.gate_proj": (GATE_OUT,),
    "mlp.up_proj": (UP_OUT,),
    "mlp.down_proj": (DOWN_OUT,),
}
FUSED_MODULES: dict[str, tuple[int, ...]] = {
    "self_attn.qkv_proj": (Q_OUT, K_OUT, V_OUT),
    "self_attn.o_proj": (O_OUT,),
    "mlp.gate_up_proj": (GATE_OUT, UP_OUT),
    "mlp.down_proj": (DOWN_OUT,),
}
EMBED, HEAD = "model.embed_tokens", "lm_head"


class AdapterArrays(NamedTuple):
    """The resident adapters as the step reads them, int64 but for the arena. Offsets are bytes in it.

    fmt: the format of their numbers. arena: uint8. inputs: [slots, layers + 1, 4, 2]: offset and padded ranks of A for
    each input; outputs: [slots, layers + 1, 7, 3]: offset and padded rank of B for each matrix, and its first column in
    the shrunk rows. The last layer's input 0 and output 0 are the head's. embed: [slots, 3]: offsets of A and B, and
    padded rank.
    """

    fmt: int
    arena: np.ndarray
    inputs: np.ndarray
    outputs: np.ndarray
    embed: np.ndarray


class Pair(NamedTuple):
    """One matrix's update B A. a: float32 [rank, in]; b: float32 [out, rank], alpha / rank folded in."""

    a: np.ndarray
    b: np.ndarray


@dataclass(frozen=True)
class Adapter:
    """An adapter's content. pairs: by module name, as in "model.layers.0.self_attn.q_proj".

    Raises AdapterError where a number is not finite.
    """

    pairs: Mapping[str, Pair]

    def __post_init__(self) -> None:
        for module, pair in self.pairs.items():
            for half, numbers in zip("AB", pair, strict=True):
                if not np.isfinite(numbers).all():
                    raise AdapterError(f"{module}: lora_{half} holds a number that is not finite")

    @property
    def rank(self) -> int:
        """The highest rank of all its matrices."""
        return max((len(pair.a) for pair in self.pairs.values()), default=0)

    @property
    def modules(self) -> list[str]:
        """The kinds of modules that it changes, as q_proj, each once."""
        return sorted({name.rsplit(".", 1)[-1] for name in self.pairs})


# ---------------------------------------------------------------- what a base model accepts


def module_outputs(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names of a layer's modules -> the outputs that each stands for."""
    return FUSED_MODULES if config.fused else MODULES


def output_rows(config: ModelConfig) -> dict[int, int]:
    """Rows of each output matrix."""
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    wide = config.intermediate_size
    return {
        Q_OUT: q,
        K_OUT: kv,
        V_OUT: kv,
        O_OUT: config.hidden_size,
        GATE_OUT: wide,
        UP_OUT: wide,
        DOWN_OUT: config.hidden_size,
    }


def input_columns(config: ModelConfig) -> dict[int, int]:
    """Columns of each input."""
    return {
        QKV_IN: config.hidden_size,
        O_IN: config.heads * config.head_dim,
        GATE_UP_IN: config.hidden_size,
        DOWN_IN: config.intermediate_size,
    }


def module_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Every module that an adapter can change -> (out, in)."""
    rows, columns = output_rows(config), input_columns(config)
    shapes = {EMBED: (config.hidden_size, config.vocab_size), HEAD: (config.vocab_size, config.hidden_size)}
    for layer in range(config.layers):
        for module, outputs in module_outputs(config).items():
            source = next(i for i, outs in OUTPUTS_OF.items() if outputs[0] in outs)
            shapes[f"model.layers.{layer}.{module}"] = (sum(rows[out] for out in outputs), columns[source])
    return shapes


# ---------------------------------------------------------------- packed


class PackedAdapter(NamedTuple):
    """An adapter's bytes, and its rows of the tables in AdapterArrays with offsets counted from its own first byte.

    digest: SHA-256 of all of it: what the step computes with, and nothing else.
    """

    data: np.ndarray
    inputs: np.ndarray
    outputs: np.ndarray
    embed: np.ndarray
    digest: str


class _Arena:
    """Takes halves of pairs, packed as fmt, one after the other, each on a cache line. size: bytes at most."""

    def __init__(self, fmt: int, size: int) -> None:
        self.fmt, self._data, self._end = fmt, np.empty(size, np.uint8), 0

    def add_shrink(self, parts: list[np.ndarray]) -> int:
        """Take these A, stacked; returns the offset of their first byte."""
        return self._add(pack_shrink(parts, self.fmt))

    def add_gather(self, a: np.ndarray) -> int:
        """Take an embedding's A; returns the offset of its first byte."""
        return self._add(pack_gather(a, self.fmt))

    def add_expand(self, b: np.ndarray) -> int:
        """Take this B; returns the offset of its first byte."""
        return self._add(pack_expand(b, self.fmt))

    def _add(self, packed: np.ndarray) -> int:
        start, end = self._end, self._end + len(packed)
        self._data[start:end] = packed
        self._end = -(-end // CACHE_LINE) * CACHE_LINE
        self._data[end : self._end] = 0
        return start

    def bytes(self) -> np.ndarray:
        """All of them."""
        return self._data[: self._end]


def _stored(pair: Pair, fmt: int) -> Pair:
    """The pair as this format stores it, before rounding."""
    return _evened(pair) if fmt == INT8 else pair


def _evened(pair: Pair) -> Pair:
    """The same update with each row of A scaled to about 1 (B compensates).

    In int8, what several ranks give, and their columns of B, share one scale, so one large rank would drown the others.
    Each rank's factor is a power of two, so that only exponents change.
    """
    sizes = np.sqrt(np.mean(np.square(pair.a, dtype=np.float64), axis=1))
    shifts = np.clip(np.rint(np.log2(np.where(sizes > 0, sizes, 1))), -LARGEST_SHIFT, LARGEST_SHIFT)
    factors = np.exp2(shifts).astype(np.float32)
    # A rank whose row of A is 0 gives nothing: its part of B must not set the others' scale.
    return Pair(pair.a / factors[:, None], pair.b * np.where(sizes > 0, factors, np.float32(0)))


def _whole_panels(rank: int) -> int:
    """Columns of the panels that this many ranks fill."""
    return -(-rank // PANEL) * PANEL


def _most_bytes(adapter: Adapter, fmt: int) -> int:
    """The most bytes that an adapter's packed form can take, padding included."""
    panels = [(len(half) // PANEL + 1, padded_rank(half.shape[1])) for pair in adapter.pairs.values() for half in pair]
    size = sum(count * panel_bytes(inner, fmt) + CACHE_LINE for count, inner in panels)
    return -(-size // CACHE_LINE) * CACHE_LINE


def pack_adapter(adapter: Adapter, config: ModelConfig, fmt: int) -> PackedAdapter:
    """An adapter in the form that the step reads, its numbers as FLOAT32, FLOAT16 or INT8.

    Raises AdapterError where it does not fit the base model, or a number is too large for float16.
    """
    _check_shapes(adapter, config)
    arena = _Arena(fmt, _most_bytes(adapter, fmt))
    inputs = np.zeros((config.layers + 1, 4, 2), np.int64)
    outputs = np.zeros((config.layers + 1, 7, 3), np.int64)
    embed = np.zeros(3, np.int64)
    try:
        for layer in range(config.layers):
            for source in OUTPUTS_OF:
                _pack_input(adapter, config, layer, source, arena, inputs[layer, source], outputs[layer])
        _pack_ends(adapter, arena, inputs[-1], outputs[-1], embed)
    except OverflowError as error:
        raise AdapterError(f"the adapter has {error}", "Take another lora_dtype.") from None
    data = arena.bytes()
    digest = hashlib.sha256(data.data)
    for table in (inputs, outputs, embed):
        digest.update(table.data)
    return PackedAdapter(data, inputs, outputs, embed, digest.hexdigest())


def _check_shapes(adapter: Adapter, config: ModelConfig) -> None:
    shapes = module_shapes(config)
    for name, (a, b) in adapter.pairs.items():
        if name not in shapes:
            raise AdapterError(f"the base model has no module {name!r} that adapters can change")
        (rows, columns), rank = shapes[name], len(a)
        if a.shape != (rank, columns) or b.shape != (rows, rank):
            raise AdapterError(
                f"{name}: A {a.shape} and B {b.shape} do not fit the base model's {rows} x {columns}",
                "The adapter was made for another base model.",
            )


def _pack_ends(
    adapter: Adapter, arena: _Arena, head_inputs: np.ndarray, head_outputs: np.ndarray, embed: np.ndarray
) -> None:
    """The pairs of the head and of the embedding."""
    if HEAD in adapter.pairs:
        a, b = _stored(adapter.pairs[HEAD], arena.fmt)
        head_inputs[0] = arena.add_shrink([a]), _whole_panels(len(a))
        head_outputs[0] = arena.add_expand(np.pad(b, ((0, -len(b) % PANEL), (0, 0)))), padded_rank(len(a)), 0
    if EMBED in adapter.pairs:
        a, b = _stored(adapter.pairs[EMBED], arena.fmt)
        embed[:] = arena.add_gather(a), arena.add_expand(b), padded_rank(len(a))


def _pack_input(
    adapter: Adapter,
    config: ModelConfig,
    layer: int,
    source: int,
    arena: _Arena,
    input_row: np.ndarray,
    output_rows_: np.ndarray,
) -> None:
    """A of all modules that read one input, side by side; B of each matrix they stand for."""
    rows, stacked, column = output_rows(config), [], 0
    for module, outs in module_outputs(config).items():
        name = f"model.layers.{layer}.{module}"
        if outs[0] not in OUTPUTS_OF[source] or name not in adapter.pairs:
            continue
        a, b = _stored(adapter.pairs[name], arena.fmt)
        start = 0
        for out in outs:
            output_rows_[out] = arena.add_expand(b[start : start + rows[out]]), padded_rank(len(a)), column
            start += rows[out]
        stacked.append(a)
        column += padded_rank(len(a))
    if stacked:
        input_row[:] = arena.add_shrink(stacked), _whole_panels(column)
