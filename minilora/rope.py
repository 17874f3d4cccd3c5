"""Rotary position embedding: frequencies of every scaling rule, and the cos and sin tables.

Formulas as in Hugging Face transformers' modeling_rope_utils; papers at each function.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import FormatError, UnsupportedError


@dataclass(frozen=True)
class Rope:
    """What config.json says about rotary embedding.

    theta: base of the frequencies; kind: scaling rule; dim: rotated part of a head (all of it, or the first
    `dim` numbers); trained_length: max_position_embeddings; scaling: the rule's own parameters.
    """

    theta: float
    dim: int
    trained_length: int
    kind: str = "default"
    scaling: Mapping[str, Any] = field(default_factory=dict)

    def tables(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(cos, sin) for positions 0 .. length - 1, each float32 [length, dim / 2].

        Rules that depend on the length of the text (dynamic, longrope) take `length`, the most that this model
        will see, so that a token's rotation never depends on what else is in the batch.
        """
        frequencies, factor = self._frequencies(length)
        angles = np.arange(length, dtype=np.float32)[:, None] * frequencies[None, :]
        return (np.cos(angles) * np.float32(factor)).astype(np.float32), (np.sin(angles) * np.float32(factor)).astype(
            np.float32
        )

    @property
    def reach(self) -> int:
        """The longest text that the positions are good for, as vLLM has it: linear and dynamic scaling stretch the
        trained length by their factor, yarn the original one; the other rules end where trained_length says."""
        stretched = 0.0
        if self.kind in ("linear", "dynamic"):
            stretched = self.trained_length * self.number("factor")
        elif self.kind == "yarn":
            original = self.number("original_max_position_embeddings", self.trained_length)
            stretched = original * self.number("factor", self.trained_length / original)
        return max(self.trained_length, int(stretched))

    def _frequencies(self, length: int) -> tuple[np.ndarray, float]:
        """The rule's, float32 [dim / 2]. Raises FormatError where its parameters lead to none."""
        with np.errstate(all="ignore"):
            try:
                exact, factor = RULES[self.kind](self, length)
            except (ArithmeticError, ValueError):  # a division by zero, the root of a negative number
                exact, factor = np.array([np.nan]), np.nan
            frequencies = exact.astype(np.float32)
            if not np.isfinite([*(frequencies * length), factor]).all():
                raise FormatError(f"config.json: rope scaling {self.kind!r}: its parameters give no finite frequencies")
        return frequencies, factor

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number among the rule's parameters. Raises FormatError."""
        value = self.scaling.get(key, default)
        if not is_positive(value):
            raise FormatError(f"config.json: rope scaling {self.kind!r} needs a positive {key}, not {value!r}")
        return float(value)


def _plain(theta: float, dim: int) -> np.ndarray:
    return 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)


def _default(rope: Rope, length: int) -> tuple[np.ndarray, float]:
    """RoFormer, arXiv:2104.09864."""
    return _plain(rope.theta, rope.dim), 1.0


def _linear(rope: Rope, length: int) -> tuple[np.ndarray, float]:
    """Position interpolation, arXiv:2306.15595."""
    return _plain(rope.theta, rope.dim) / rope.number("factor"), 1.0


def _dynamic(rope: Rope, length: int) -> tuple[np.ndarray, float]:
    """Dynamic NTK: a larger base for texts beyond the trained length."""
    factor, longest = rope.number("factor"), max(length, rope.trained_length)
    stretch = factor * longest / rope.trained_length - (factor - 1)
    return _plain(rope.theta * stretch ** (rope.dim / (rope.dim - 2)), rope.dim), 1.0


def _llama3(rope: Rope, length: int) -> tuple[np.ndarray, float]:
    """Llama 3.1: low frequencies divided by the factor, high ones kept, a smooth transition between."""
    factor, low, high = (rope.number(k) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = rope.number("original_max_position_embeddings", rope.trained_length)
    frequencies = _plain(rope.theta, rope.dim)
    turns = original * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (smooth + (1 - smooth) / factor), 1.0


def _yarn(rope: Rope, length: int) -> tuple[np.ndarray, float]:
    """YaRN, arXiv:2309.00071."""
    original = rope.number("original_max_position_embeddings", rope.trained_length)
    factor = rope.number("factor", rope.trained_length / original)
    fast, slow = rope.number("beta_fast", 32), rope.number("beta_slow", 1)

    def dimension_of(rotations: float) -> float:
        return rope.dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(fast), dimension_of(slow)
    if rope.scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = np.clip((np.arange(rope.dim // 2) - low) / (high - low or 0.001), 0, 1)
    frequencies = _plain(rope.theta, rope.dim)
    return frequencies * (1 - ramp) + frequencies / factor * ramp, _yarn_attention(rope, factor)


def _yarn_attention(rope: Rope, factor: float) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if rope.scaling.get("attention_factor") is not None:
        return rope.number("attention_factor")
    if rope.scaling.get("mscale") and rope.scaling.get("mscale_all_dim"):
        return scale(rope.number("mscale")) / scale(rope.number("mscale_all_dim"))
    return scale(1.0)


def _longrope(rope: Rope, length: int) -> tuple[np.ndarray, float]:
    """LongRoPE, arXiv:2402.13753: one list of factors up to the original length, another beyond."""
    original = rope.number("original_max_position_embeddings", rope.trained_length)
    key = "long_factor" if length > original else "short_factor"
    factors = rope.scaling.get(key)
    if not isinstance(factors, list) or len(factors) != rope.dim // 2 or not all(map(is_positive, factors)):
        raise FormatError(f"config.json: rope scaling 'longrope' needs {rope.dim // 2} positive numbers in {key}")
    if rope.scaling.get("attention_factor") is not None:
        attention = rope.number("attention_factor")
    else:
        stretch = rope.number("factor", rope.trained_length / original)
        attention = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return _plain(rope.theta, rope.dim) / np.array(factors, np.float64), attention


RULES = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}


LARGEST = float(np.finfo(np.float32).max)


def is_positive(value: Any) -> bool:
    """Whether a value read from a file is a number above 0 that float32 holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= LARGEST


def check_kind(kind: Any) -> str:
    """`kind` if it is a rule that we have. Raises UnsupportedError."""
    if not isinstance(kind, str) or kind not in RULES:
        raise UnsupportedError(f"config.json: unknown rope scaling {kind!r}", f"Known: {', '.join(RULES)}.")
    return kind
