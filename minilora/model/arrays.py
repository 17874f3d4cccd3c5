"""The arrays of a step."""

from typing import NamedTuple

import numpy as np

from minilora_kernels.batch import StepInput, StepRows
from minilora_kernels.inputs import Rows
from minilora_kernels.pages import KV

from ..adapters import AdapterArrays
from ..weights import Network

# Up to so many rows every thread normalises and quantises all of them itself, but for the head.
FEW = 8


class Shape(NamedTuple):
    """Sizes of the model, README's L, E, H, K, D, F and V; eps of the norms."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    forward: int
    vocabulary: int
    eps: np.float32


class Buffers(NamedTuple):
    """Scratch of the step, allocated once: flat arrays of float32 where nothing else is said; a and b: see Rows.

    x: [T, width], the residual stream; a: inputs of q k v, o and gate up; b: inputs of down; qkv: [T, qkv];
    s: [T, s_stride], shrunk rows, of int8 adapters as wide integers; scratch: scratch_stride numbers for each thread;
    parts: unmerged attention; unpacked: uint8, unpacked_stride for each thread, the room of `linear`; logits: [rows,
    vocabulary padded to 32]; bests: int64 [rows, threads], where the largest of each thread's columns is, or NONE;
    chances, ids: float32 and int64, a row of logits for each thread. shared: how many rows of `a` all threads share;
    after them come FEW rows for each thread.
    """

    x: np.ndarray
    a: Rows
    b: Rows
    qkv: np.ndarray
    qkv_stride: int
    s: np.ndarray
    s_stride: int
    scratch: np.ndarray
    scratch_stride: int
    parts: np.ndarray
    unpacked: np.ndarray
    unpacked_stride: int
    logits: np.ndarray
    bests: np.ndarray
    chances: np.ndarray
    ids: np.ndarray
    shared: int


class Fixed(NamedTuple):
    """What all steps share."""

    w: Network
    shape: Shape
    kv: KV
    adapters: AdapterArrays
    buffers: Buffers


class Context(NamedTuple):
    """What every phase of a step sees: the thread, how many there are, their barrier, the round, and all arrays.

    Kernels get it by address, see `hold`.
    """

    thread: int
    threads: int
    sync: np.ndarray
    turn: int
    w: Network
    shape: Shape
    kv: KV
    batch: StepInput
    rows: StepRows
    adapters: AdapterArrays
    buffers: Buffers
