"""GGUF files for tests: real ones by the gguf package, malformed ones byte by byte."""

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np

from minilora.checkpoint.ggml import BLOCK_TYPES, BlockType
from minilora.config import ModelConfig

from .support import BASE_CONFIG, SPECIAL, make_tokenizer, random_weights

K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
QUANTISED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32")

# Where the float16 numbers of a block are.
HALVES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q2_K": [80, 82],
    "Q3_K": [108],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}


def string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def header(tensors: int, entries: int, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, entries)


def entry(key: str, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape, kind: int = 0, offset: int = 0, dimensions: int | None = None) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    return (
        string(name)
        + struct.pack("<I", count)
        + b"".join(struct.pack("<Q", n) for n in shape)
        + struct.pack("<IQ", kind, offset)
    )


def pair_rows(x: np.ndarray, heads: int) -> np.ndarray:
    """q and k rows as llama-type GGUF files order them."""
    return x.reshape(heads, 2, len(x) // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write_llama(
    path: Path,
    kind: str = "F32",
    seed: int = 0,
    mixed: dict[str, str] | None = None,
    extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    **changes,
) -> dict[str, np.ndarray]:
    """A tiny llama as GGUF; returns its weights under Hugging Face names, before quantisation (K-quants are random).

    extra: writes more.
    """
    config = ModelConfig.from_dict({**BASE_CONFIG, "num_key_value_heads": 2, **changes})
    weights = random_weights(config, seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    add_vocabulary(writer)
    extra(writer)
    names = {
        v: k
        for k, v in {
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj",
            "ffn_up": "mlp.up_proj",
            "ffn_down": "mlp.down_proj",
        }.items()
    }
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for name, weight in weights.items():
        if name in top:
            ours = top[name]
        else:
            _, _, layer, rest = name.split(".", 3)
            ours = f"blk.{layer}.{names[rest.removesuffix('.weight')]}.weight"
        if ".attn_q." in ours or ".attn_k." in ours:
            weight = pair_rows(weight, config.heads if ".attn_q." in ours else config.kv_heads)
        add(writer, ours, weight, "F32" if weight.ndim == 1 else (mixed or {}).get(ours, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def random_blocks(kind: BlockType, rng: np.random.Generator, rows: int, blocks: int) -> np.ndarray:
    """Raw blocks whose float16 fields are finite and small, uint8 [rows, bytes]."""
    raw = rng.integers(0, 256, (rows, blocks * kind.size), dtype=np.uint8)
    each = raw.reshape(-1, kind.size)
    halves = range(0, kind.size, 2) if kind.name == "F16" else HALVES.get(kind.name, [])
    for at in halves:
        each[:, at : at + 2] = (rng.standard_normal(len(each)) * 0.01).astype(np.float16).view(np.uint8).reshape(-1, 2)
    if kind.name in ("F32", "BF16"):
        values = rng.standard_normal(raw.size // kind.size).astype(np.float32)
        raw = (
            (values if kind.name == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16))
            .view(np.uint8)
            .reshape(rows, -1)
        )
    return raw


def k_quant(kind: str, rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Raw blocks of a matrix of about the size of trained ones. The gguf package reads K-quants, but makes none."""
    of = BLOCK_TYPES[int(gguf.GGMLQuantizationType[kind])]
    raw = random_blocks(of, rng, rows, columns // of.values)
    size = of.floats(raw).std() * np.sqrt(columns)
    for at in HALVES[kind]:
        halves = raw.reshape(-1, of.size)[:, at : at + 2]
        smaller = np.ascontiguousarray(halves).view(np.float16) / np.float32(size)
        halves[:] = smaller.astype(np.float16).view(np.uint8)
    return raw


def add(writer: gguf.GGUFWriter, name: str, weight: np.ndarray, kind: str) -> None:
    qtype = gguf.GGMLQuantizationType[kind]
    if kind in K_QUANTS:
        rng = np.random.default_rng(list(name.encode()))
        writer.add_tensor(name, k_quant(kind, rng, *weight.shape), raw_dtype=qtype)
        return
    data = gguf.quants.quantize(np.ascontiguousarray(weight), qtype)
    writer.add_tensor(name, data, raw_dtype=None if kind in ("F32", "F16") else qtype)


def add_vocabulary(writer: gguf.GGUFWriter) -> None:
    vocabulary = make_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(["< |"])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
