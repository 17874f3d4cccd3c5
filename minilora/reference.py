"""The same network in plain NumPy: one sequence, no cache, no pages, no batching. Slow, to trust and to teach with.

Shapes: T tokens, E width, H query heads, K kv heads, D head size, F feed-forward width, V vocabulary.
"""

from collections.abc import Mapping

import numpy as np

from .config import ModelConfig

Floats = Mapping[str, np.ndarray]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:  # [.., n] -> [.., n]
    """x / sqrt(mean(x^2) + eps) * weight."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps)) * weight


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:  # [T, heads, D] -> same
    """Rotate (x[i], x[half + i]) by the position's angle i; numbers beyond 2 * half stay."""
    half = cos.shape[1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    c, s = cos[:, None], sin[:, None]
    return np.concatenate([a * c - b * s, b * c + a * s, rest], axis=-1)


def softmax(x: np.ndarray) -> np.ndarray:
    """exp(x) / sum(exp(x)) over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x)."""
    return x / (1 + np.exp(-x))


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int) -> np.ndarray:  # [T, H, D] -> [T, H, D]
    """softmax(q . k / sqrt(D)) . v over earlier positions, the last `window` of them if window > 0."""
    length, heads, size = q.shape
    k, v = (np.repeat(x, heads // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(np.float32(size))
    distance = np.arange(length)[:, None] - np.arange(length)[None, :]
    hidden = (distance < 0) | ((distance >= window) if window else False)
    return np.einsum("hqk,khd->qhd", softmax(np.where(hidden, -np.inf, scores)), v)


class Reference:
    """A model as float32 arrays under their Hugging Face names, and its forward pass."""

    def __init__(self, config: ModelConfig, weights: Floats, length: int):
        self.config, self.weights = config, weights
        self.cos, self.sin = config.rope.tables(length)

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:  # [T, in] -> [T, out]
        """x W^T + bias."""
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def forward(self, tokens: list[int]) -> np.ndarray:  # [T] -> [T, V]
        """The logits after each token."""
        x = self.embed(tokens)
        for layer in range(self.config.layers):
            x = x + self.attention(x, layer)
            x = x + self.mlp(x, layer)
        x = rms_norm(x, self.weights["model.norm.weight"], self.config.rms_norm_eps)
        return self.linear(x, "lm_head")

    def embed(self, tokens: list[int]) -> np.ndarray:  # [T] -> [T, E]
        """Rows of the input embedding."""
        return self.weights["model.embed_tokens.weight"][tokens]

    def attention(self, x: np.ndarray, layer: int) -> np.ndarray:  # [T, E] -> [T, E]
        """The attention half of a layer, norm included."""
        c, name, length = self.config, f"model.layers.{layer}", len(x)
        x = rms_norm(x, self.weights[f"{name}.input_layernorm.weight"], c.rms_norm_eps)
        q, k, v = (y.reshape(length, -1, c.head_dim) for y in self.project(x, f"{name}.self_attn", layer))
        if c.qk_norm:
            q = rms_norm(q, self.weights[f"{name}.self_attn.q_norm.weight"], c.rms_norm_eps)
            k = rms_norm(k, self.weights[f"{name}.self_attn.k_norm.weight"], c.rms_norm_eps)
        if c.rotary[layer]:
            q, k = (rotate(y, self.cos[:length], self.sin[:length]) for y in (q, k))
        return self.linear(attend(q, k, v, c.windows[layer]).reshape(length, -1), f"{name}.self_attn.o_proj")

    def project(self, x: np.ndarray, name: str, layer: int) -> list[np.ndarray]:  # [T, E] -> q, k, v
        """q, k and v of a layer."""
        c = self.config
        if not c.fused:
            return [self.linear(x, f"{name}.{part}_proj") for part in "qkv"]
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        return np.split(self.linear(x, f"{name}.qkv_proj"), [q, q + kv], axis=1)

    def mlp(self, x: np.ndarray, layer: int) -> np.ndarray:  # [T, E] -> [T, E]
        """The feed-forward half of a layer, norm included."""
        name = f"model.layers.{layer}"
        x = rms_norm(x, self.weights[f"{name}.post_attention_layernorm.weight"], self.config.rms_norm_eps)
        if self.config.fused:
            gate, up = np.split(self.linear(x, f"{name}.mlp.gate_up_proj"), 2, axis=1)
        else:
            gate, up = self.linear(x, f"{name}.mlp.gate_proj"), self.linear(x, f"{name}.mlp.up_proj")
        return self.linear(silu(gate) * up, f"{name}.mlp.down_proj")
