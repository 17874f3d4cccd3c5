"""The tables of a packed model, checked: kernels trust them, but a folder on disk is not to be trusted."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from minilora_kernels import pack
from minilora_kernels.formats import FORMATS, GROUPS, SUPER, group_of, is_float, is_nested
from minilora_kernels.memory import CACHE_LINE

from .config import ModelConfig
from .errors import FormatError
from .plan import (
    DOWN,
    DOWN_BIAS,
    GATE_UP,
    GATE_UP_BIAS,
    INPUT_NORM,
    K_NORM,
    LAYER_WIDTH,
    O_BIAS,
    POST_NORM,
    Q_NORM,
    QKV,
    QKV_BIAS,
    QKV_PARTS,
    ROTARY,
    WINDOW,
    O,
    biases,
    layer_norms,
)
from .weights import Weights

# What to do about a packed model that is damaged.
ANEW = "Delete the folder, and quantize its source again."

_VECTORS = (INPUT_NORM, POST_NORM, Q_NORM, K_NORM, QKV_BIAS, O_BIAS, GATE_UP_BIAS, DOWN_BIAS)


class _Role(NamedTuple):
    """What some rows of the matrices table together must be: `parts` of them from `first` on."""

    first: int
    parts: int
    rows: int
    columns: int


def check_tables(weights: Weights) -> None:
    """Raise FormatError where a table names anything but what the config says, or bytes that are not in the arena."""
    config, matrices, layers, size = weights.config, weights.matrices, weights.layers, len(weights.arena)
    for number in (weights.embed, weights.head, weights.final_norm):
        _require(isinstance(number, int), "a place in the tables is not an integer")
    _require(matrices.ndim == 2 and matrices.shape[1:] == (6,), "the table of matrices has another shape")
    _require(layers.shape == (config.layers, LAYER_WIDTH), "the table of layers has another shape")
    for row in matrices:
        _check_matrix(row, size)
    for role in _roles(weights):
        _require(0 <= role.first <= len(matrices) - role.parts and role.parts > 0, "a matrix is not in its table")
        found = matrices[role.first : role.first + role.parts]
        right = found[:, pack.ROWS].sum() == role.rows and (found[:, pack.COLUMNS] == role.columns).all()
        _require(right, "a matrix is not of the size that the config says")
        _require(len(set(found[:, pack.GROUP].tolist())) == 1, "matrices with the same inputs have other groups")
    _require(tuple(layers[:, WINDOW].tolist()) == config.windows, "the windows are not the config's")
    _require(tuple((layers[:, ROTARY] == 1).tolist()) == config.rotary, "the rotated layers are not the config's")
    for offset, length in _vectors(config, layers, weights.final_norm):
        if length == 0:
            _require(offset == -1, "there is a vector that the config does not know")
        else:
            inside = 0 <= offset <= size - 4 * length and offset % CACHE_LINE == 0
            _require(inside, "a vector is not in the weights")


def _check_matrix(row: np.ndarray, size: int) -> None:
    fmt, rows, columns, group = (int(row[i]) for i in (pack.FORMAT, pack.ROWS, pack.COLUMNS, pack.GROUP))
    known = 0 <= fmt < len(FORMATS) and rows > 0 and columns > 0 and rows % pack.BLOCK == 0
    _require(known, "a matrix is of a format or size that is not known")
    whole = SUPER if is_nested(fmt) else group
    grouped = group in GROUPS and columns % whole == 0
    _require(group == group_of(fmt, 0) if is_float(fmt) else grouped, "a group is wrong")
    _require(int(row[pack.BLOCK_BYTES]) == pack.block_bytes(fmt, columns, group), "a matrix has blocks of another size")
    offset, needed = int(row[pack.OFFSET]), pack.packed_bytes(fmt, rows, columns, group)
    _require(0 <= offset <= size - needed and offset % CACHE_LINE == 0, "a matrix is not in the weights")


def _roles(weights: Weights) -> Iterator[_Role]:
    config = weights.config
    width, forward, vocabulary = config.hidden_size, config.intermediate_size, pack.padded_rows(config.vocab_size)
    yield _Role(weights.embed, 1, vocabulary, width)
    yield _Role(weights.head, 1, vocabulary, width)
    for layer in weights.layers:
        yield _Role(int(layer[QKV]), int(layer[QKV_PARTS]), pack.padded_rows(config.qkv_rows), width)
        yield _Role(int(layer[O]), 1, width, config.heads * config.head_dim)
        yield _Role(int(layer[GATE_UP]), 1, 2 * forward, width)
        yield _Role(int(layer[DOWN]), 1, width, forward)


def _vectors(config: ModelConfig, layers: np.ndarray, final_norm: int) -> Iterator[tuple[int, int]]:
    """(offset, numbers) of every vector; no numbers where there must be none."""
    has = biases(config)
    lengths = {
        QKV_BIAS: config.qkv_rows * has["qkv"],
        O_BIAS: config.hidden_size * has["o"],
        GATE_UP_BIAS: 2 * config.intermediate_size * has["gate_up"],
        DOWN_BIAS: config.hidden_size * has["down"],
    }
    yield final_norm, config.hidden_size
    for number, layer in enumerate(layers):
        norms = {column: length for column, (_, length) in layer_norms(config, number).items()}
        for column in _VECTORS:
            yield int(layer[column]), (lengths | norms).get(column, 0)


def _require(right: bool, cause: str) -> None:
    if not right:
        raise FormatError(f"the packed model is damaged: {cause}", ANEW)
