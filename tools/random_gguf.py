"""Write a GGUF file with random weights in the shape of a known model, to measure speed: its answers are nonsense.

    python tools/random_gguf.py tinyllama-1.1b q4_0 OUT.gguf

Both minilora and llama.cpp read it. The vocabulary is bytes and filler. Needs the `gguf` package (extra `test`).
"""

import argparse
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize

# layers, width, heads, kv heads, head size, feed-forward width, vocabulary, rotary base, tied head
SHAPES = {
    "smollm2-135m": (30, 576, 9, 3, 64, 1536, 49152, 1e5, True),
    "tinyllama-1.1b": (22, 2048, 32, 4, 64, 5632, 32000, 1e4, False),
    "llama-3.2-1b": (16, 2048, 32, 8, 64, 8192, 128256, 5e5, True),
}
TYPES = {
    "q4_0": GGMLQuantizationType.Q4_0,
    "q4_1": GGMLQuantizationType.Q4_1,
    "q8_0": GGMLQuantizationType.Q8_0,
    "f16": GGMLQuantizationType.F16,
}


class RandomWriter:
    """Writes one file. Matrices are made one by one, so that float32 of all is never in memory at once."""

    def __init__(self, path: Path, shape: str, kind: str, seed: int):
        (
            self.layers,
            self.width,
            self.heads,
            self.kv_heads,
            self.size,
            self.inner,
            self.vocabulary,
            self.base,
            self.tied,
        ) = SHAPES[shape]
        self.kind, self.rng = TYPES[kind], np.random.default_rng(seed)
        self.writer = GGUFWriter(path, "llama", use_temp_file=True)
        self._write_settings(shape)
        self._write_vocabulary()

    def _write_settings(self, shape: str) -> None:
        writer = self.writer
        writer.add_name(f"random weights, {shape}")
        writer.add_block_count(self.layers)
        writer.add_context_length(8192)
        writer.add_embedding_length(self.width)
        writer.add_feed_forward_length(self.inner)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_key_length(self.size)
        writer.add_value_length(self.size)
        writer.add_rope_dimension_count(self.size)
        writer.add_rope_freq_base(self.base)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(self.vocabulary)

    def _write_vocabulary(self) -> None:
        special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        filler = [f"▁w{i}" for i in range(self.vocabulary - len(special))]
        types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
        self.writer.add_tokenizer_model("llama")
        self.writer.add_token_list(special + filler)
        self.writer.add_token_scores([0.0] * len(special) + [-float(i) for i in range(len(filler))])
        self.writer.add_token_types([*types, *([TokenType.NORMAL] * len(filler))])
        self.writer.add_bos_token_id(1)
        self.writer.add_eos_token_id(2)
        self.writer.add_unk_token_id(0)

    def matrix(self, name: str, rows: int, columns: int) -> None:
        numbers = self.rng.standard_normal((rows, columns), np.float32) * np.float32(1 / columns**0.5)
        self.writer.add_tensor(name, quantize(numbers, self.kind), raw_dtype=self.kind)

    def norm(self, name: str) -> None:
        self.writer.add_tensor(name, np.ones(self.width, np.float32))

    def write(self) -> None:
        """Write all tensors, under llama.cpp's names."""
        self.matrix("token_embd.weight", self.vocabulary, self.width)
        for i in range(self.layers):
            self.norm(f"blk.{i}.attn_norm.weight")
            self.matrix(f"blk.{i}.attn_q.weight", self.heads * self.size, self.width)
            self.matrix(f"blk.{i}.attn_k.weight", self.kv_heads * self.size, self.width)
            self.matrix(f"blk.{i}.attn_v.weight", self.kv_heads * self.size, self.width)
            self.matrix(f"blk.{i}.attn_output.weight", self.width, self.heads * self.size)
            self.norm(f"blk.{i}.ffn_norm.weight")
            self.matrix(f"blk.{i}.ffn_gate.weight", self.inner, self.width)
            self.matrix(f"blk.{i}.ffn_up.weight", self.inner, self.width)
            self.matrix(f"blk.{i}.ffn_down.weight", self.width, self.inner)
        self.norm("output_norm.weight")
        if not self.tied:
            self.matrix("output.weight", self.vocabulary, self.width)
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("type", choices=TYPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    RandomWriter(options.out, options.shape, options.type, options.seed).write()
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.0f} MB")


if __name__ == "__main__":
    main()
