"""Models in GGUF files: their metadata as a config.json, their tensors under Hugging Face's names."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minilora_kernels.quantized import Quantized

from ..config import ModelConfig
from ..errors import FormatError, UnsupportedError
from ..tokenizer import TokenizerFiles
from ..tokenizer_gguf import end_tokens, tokenizer_from_gguf
from .gguf import Gguf, GgufTensor

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}

# Architectures whose q and k rows GGUF stores in pairs (2i, 2i + 1) instead of halves (i, i + dim / 2).
PAIRED = ("llama", "smollm3")

GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output.weight": "lm_head.weight",
    "output_norm.weight": "model.norm.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FREQS, ROPE_SHORT, ROPE_LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
SCALING_TYPES = ("none", "linear", "yarn", "longrope")
NUMBER = (int, float)

# Keys of an architecture that we read, and those that change nothing in the computation.
READ = frozenset(
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.attn_factor",
        "rope.scaling.original_context_length",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "vocab_size",
    ]
)
HARMLESS = frozenset(("rope.scaling.finetuned", "attention.causal", "use_parallel_residual", "tensor_data_layout"))


class GgufCheckpoint:
    """A model in one GGUF file. Raises FormatError and UnsupportedError, naming the key or tensor."""

    def __init__(self, path: Path):
        self.path = path
        self._gguf = Gguf(path)
        self._arch = self._gguf.get("general.architecture", str)
        if self._arch not in ARCHITECTURES:
            raise UnsupportedError(f"{path.name}: architecture {self._arch!r}", f"Known: {', '.join(ARCHITECTURES)}.")
        self._tensors = self._named()
        self.config = ModelConfig.from_dict(self._config())
        self.generation: Mapping[str, Any] = {"eos_token_id": list(self.config.eos_token_ids)}

    # ------------------------------------------------------------ names

    def _named(self) -> dict[str, GgufTensor]:
        found: dict[str, GgufTensor] = {}
        for name, tensor in self._gguf.tensors.items():
            if name not in (ROPE_FREQS, ROPE_SHORT, ROPE_LONG):
                if (meant := self._translate(name)) in found:
                    raise FormatError(f"{self.path.name}: {name!r} is there under another name, too")
                found[meant] = tensor
        return found

    def _translate(self, name: str) -> str:
        if name in GLOBAL_NAMES:
            return GLOBAL_NAMES[name]
        match = re.fullmatch(r"blk\.(\d{1,4})\.([a-z_]+)\.(weight|bias)", name)
        if not match or match[2] not in LAYER_NAMES:
            raise UnsupportedError(f"{self.path.name}: tensor {name!r} is not known")
        inner = "mlp.gate_up_proj" if self._arch == "phi3" and match[2] == "ffn_up" else LAYER_NAMES[match[2]]
        return f"model.layers.{int(match[1])}.{inner}.{match[3]}"

    # ------------------------------------------------------------ configuration

    def _value(self, key: str, kind: Any, default: Any = None) -> Any:
        return self._gguf.get(f"{self._arch}.{key}", kind, default)

    def _config(self) -> dict[str, Any]:
        self._check_keys()
        window = self._value("attention.sliding_window", int)
        config: dict[str, Any] = {
            # GGUF's llama is Mistral too, whose layers may have windows.
            "architectures": ["MistralForCausalLM" if window and self._arch == "llama" else ARCHITECTURES[self._arch]],
            "hidden_size": self._value("embedding_length", int),
            "num_hidden_layers": self._value("block_count", int),
            "num_attention_heads": self._same("attention.head_count"),
            "num_key_value_heads": self._same("attention.head_count_kv"),
            "intermediate_size": self._same("feed_forward_length"),
            "max_position_embeddings": self._value("context_length", int),
            "rms_norm_eps": self._value("attention.layer_norm_rms_epsilon", float),
            "vocab_size": self._tensor("model.embed_tokens.weight").shape[0],
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "sliding_window": window or None,
            "use_sliding_window": bool(window),
            "head_dim": self._head_dim(),
            "rope_parameters": self._rope(),
            "eos_token_id": end_tokens(self._gguf.metadata),
            "bos_token_id": self._gguf.get("tokenizer.ggml.bos_token_id", int),
            "attention_bias": self._arch == "llama" and "model.layers.0.self_attn.o_proj.bias" in self._tensors,
        }
        return {key: value for key, value in config.items() if value is not None}

    def _check_keys(self) -> None:
        prefix = f"{self._arch}."
        for key in self._gguf.metadata:
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and name not in READ | HARMLESS:
                raise UnsupportedError(f"{self.path.name}: metadata {key!r}: minilora does not know what it changes")

    def _same(self, key: str) -> int | None:
        """A number that GGUF may give for each layer; ours is one for all."""
        value = self._value(key, (int, np.ndarray))
        if isinstance(value, np.ndarray):
            if len(set(value.tolist())) != 1:
                raise UnsupportedError(f"{self.path.name}: {self._arch}.{key} differs between layers")
            value = int(value[0])
        return value

    def _head_dim(self) -> int | None:
        key, value = self._value("attention.key_length", int), self._value("attention.value_length", int)
        if key != value:
            raise UnsupportedError(f"{self.path.name}: keys of {key} numbers and values of {value}")
        return key

    def _rope(self) -> dict[str, Any]:
        rope: dict[str, Any] = {"rope_theta": self._value("rope.freq_base", float, 10000.0)}
        heads, width = self._same("attention.head_count"), self._value("embedding_length", int)
        rotated = self._value("rope.dimension_count", int)
        head_dim = self._head_dim() or (width // heads if heads and width else rotated)
        if rotated and head_dim and rotated != head_dim:
            rope["partial_rotary_factor"] = rotated / head_dim
        return rope | self._rope_scaling()

    def _rope_scaling(self) -> dict[str, Any]:
        """The rule and its numbers, by llama.cpp's rules where the file is silent: without a type it is linear,
        divisors stored as tensors count whatever the type, and attn_factor multiplies the rule's own factor."""
        kind = self._value("rope.scaling.type", str, "linear")
        if kind not in SCALING_TYPES:
            raise UnsupportedError(
                f"{self.path.name}: rope.scaling.type {kind!r}", f"Known: {', '.join(SCALING_TYPES)}."
            )
        factor = (self._value("rope.scaling.factor", NUMBER) if kind != "none" else None) or 1.0
        attention = self._value("rope.scaling.attn_factor", NUMBER, 1.0)
        divisors = self._rope_divisors(factor)
        if divisors and kind == "yarn":
            raise UnsupportedError(f"{self.path.name}: rope scaling 'yarn' together with factors stored as tensors")
        if divisors:
            kind = "longrope"
        elif kind == "none" or (kind == "linear" and factor == 1):
            kind = "default"
        if kind == "yarn":
            attention *= 1 + 0.1 * math.log(max(factor, 1.0))
        elif kind != "longrope" and attention != 1:
            raise UnsupportedError(f"{self.path.name}: rope.scaling.attn_factor {attention} with rope scaling {kind!r}")
        numbers = {
            "factor": factor,
            "attention_factor": attention,
            "original_max_position_embeddings": self._value("rope.scaling.original_context_length", int) or None,
            "beta_fast": self._value("rope.scaling.yarn_beta_fast", NUMBER),
            "beta_slow": self._value("rope.scaling.yarn_beta_slow", NUMBER),
        }
        return {"rope_type": kind, **{key: value for key, value in numbers.items() if value is not None}, **divisors}

    def _rope_divisors(self, factor: float) -> dict[str, list[float]]:
        """Divisors of the frequencies, stored as tensors: Llama 3's and longrope's. Those of `factor` come on top."""
        tensors = self._gguf.tensors
        short, long = (ROPE_FREQS, ROPE_FREQS) if ROPE_FREQS in tensors else (ROPE_SHORT, ROPE_LONG)
        found = {
            key: (self._floats(tensors[name]) * factor).reshape(-1).tolist()
            for key, name in (("short_factor", short), ("long_factor", long))
            if name in tensors
        }
        if len(found) == 1:
            raise FormatError(f"{self.path.name}: of {short!r} and {long!r} one is missing")
        return found

    # ------------------------------------------------------------ tensors

    def _tensor(self, name: str) -> GgufTensor:
        if name not in self._tensors:
            raise FormatError(f"{self.path.name}: tensor for {name!r} is missing")
        return self._tensors[name]

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def format(self, name: str) -> int:
        return self._tensor(name).kind.format

    def group(self, name: str) -> int:
        return self._tensor(name).kind.group

    def read(self, name: str, rows: slice) -> Quantized | np.ndarray:
        return self._tensor(name).kind.weights(self._raw(name, rows))

    def read_float(self, name: str, rows: slice) -> np.ndarray:
        tensor = self._tensor(name)
        if len(tensor.shape) > 1:
            return tensor.kind.floats(self._raw(name, rows))
        values = self._floats(tensor)[0]
        return values[self._order(name, len(values))][rows]

    def _floats(self, tensor: GgufTensor) -> np.ndarray:
        return tensor.kind.floats(self._gguf.rows(tensor))

    def _raw(self, name: str, rows: slice) -> np.ndarray:
        tensor = self._tensor(name)
        return self._gguf.rows(tensor)[self._order(name, tensor.shape[0])[rows]]

    def _order(self, name: str, rows: int) -> np.ndarray:
        """Where in the file each of our rows is."""
        order = np.arange(rows)
        paired = {"q_proj": self.config.heads, "k_proj": self.config.kv_heads}
        heads = paired.get(name.split(".")[-2])
        if self._arch in PAIRED and heads and rows % (2 * heads) == 0:
            return order.reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
        return order

    def tokenizer(self) -> TokenizerFiles:
        return tokenizer_from_gguf(self._gguf.metadata)
