"""Models in GGUF files: their metadata as a config.json, their tensors under Hugging Face's names."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minilora_kernels.pack import Quantized

from ..config import ModelConfig
from ..errors import FormatError, UnsupportedError
from ..tokenizer import TokenizerFiles
from ..tokenizer_gguf import tokenizer_from_gguf
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
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

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
        found = {}
        for name, tensor in self._gguf.tensors.items():
            if name not in ROPE_FACTORS:
                found[self._translate(name)] = tensor
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
        config: dict[str, Any] = {
            "architectures": [ARCHITECTURES[self._arch]],
            "hidden_size": self._value("embedding_length", int),
            "num_hidden_layers": self._value("block_count", int),
            "num_attention_heads": self._same("attention.head_count"),
            "num_key_value_heads": self._same("attention.head_count_kv"),
            "intermediate_size": self._same("feed_forward_length"),
            "max_position_embeddings": self._value("context_length", int),
            "rms_norm_eps": self._value("attention.layer_norm_rms_epsilon", float),
            "vocab_size": self._tensor("model.embed_tokens.weight").shape[0],
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "sliding_window": self._value("attention.sliding_window", int) or None,
            "use_sliding_window": bool(self._value("attention.sliding_window", int)),
            "head_dim": self._head_dim(),
            "rope_parameters": self._rope(),
            "eos_token_id": self._ends(),
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
        kind = self._value("rope.scaling.type", str) or "none"
        names = {
            "factor": "factor",
            "original_context_length": "original_max_position_embeddings",
            "attn_factor": "attention_factor",
            "yarn_beta_fast": "beta_fast",
            "yarn_beta_slow": "beta_slow",
        }
        for key, ours in names.items():
            value = self._value(f"rope.scaling.{key}", (int, float))
            if value is not None and kind != "none":
                rope[ours] = value
        rope["rope_type"] = "default" if kind == "none" else kind
        return rope | self._rope_factors()

    def _rope_factors(self) -> dict[str, Any]:
        """Divisors of the frequencies, stored as tensors: Llama 3's and longrope's."""
        tensors = self._gguf.tensors
        if "rope_freqs.weight" in tensors:
            divisors = self._floats(tensors["rope_freqs.weight"]).reshape(-1).tolist()
            return {"rope_type": "longrope", "short_factor": divisors, "long_factor": divisors, "attention_factor": 1.0}
        if "rope_factors_long.weight" in tensors and "rope_factors_short.weight" in tensors:
            long, short = (self._floats(tensors[f"rope_factors_{kind}.weight"]) for kind in ("long", "short"))
            return {
                "rope_type": "longrope",
                "long_factor": long.reshape(-1).tolist(),
                "short_factor": short.reshape(-1).tolist(),
            }
        return {}

    def _ends(self) -> list[int]:
        """All tokens that end a turn or a text."""
        ids = [self._gguf.get(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot", "eom")]
        return sorted({i for i in ids if i is not None})

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
