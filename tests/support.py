"""Makers of tiny random checkpoints, adapters, engines, and of trouble in the middle of something."""

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from minilora.adapters import module_shapes
from minilora.checkpoint import open_checkpoint
from minilora.config import ModelConfig
from minilora.engine import Engine
from minilora.packer import pack_in_memory
from minilora.params import EngineConfig, SamplingParams
from minilora.peft import adapter_from_arrays
from minilora.plan import Plan, Target, expected_shapes

VOCABULARY = 263
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

BASE_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "bos_token_id": 1,
}

# Every architecture row, and every option of the mathematics at least once.
ARCHITECTURES = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "llama-bias": {"attention_bias": True, "mlp_bias": True},
    "llama-wide-heads": {"head_dim": 48, "num_key_value_heads": 1},
    "llama-odd-heads": {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1},
    # Large enough for threads to help each other, with nothing even.
    "llama-large": {
        "hidden_size": 640,
        "intermediate_size": 2112,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
        "head_dim": 48,
        "vocab_size": 4650,
        "max_position_embeddings": 2048,
    },
    "llama-linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama-dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 16.0}, "max_position_embeddings": 64},
    "llama-llama3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
    "llama-yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 37},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
    "smollm3": {
        "architectures": ["SmolLM3ForCausalLM"],
        "no_rope_layers": [1, 0],
        "use_sliding_window": True,
        "sliding_window": 37,
    },
    "phi3": {"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 0.5, "sliding_window": None},
}


def make_tokenizer() -> Tokenizer:
    """Bytes as tokens, three special tokens before them, four idle ones after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *(f"<idle{i}>" for i in range(4))])}
    engine = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return engine


def random_weights(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """Weights of a size that keeps activations near 1; norms near 1."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in expected_shapes(config).items():
        x = rng.standard_normal(shape, dtype=np.float32)
        if name.endswith("norm.weight"):
            weights[name] = 1 + 0.1 * x
        elif name.endswith("bias"):
            weights[name] = 0.2 * x
        else:
            weights[name] = x * np.float32(1.5 / np.sqrt(shape[1]))
    return weights


def make_checkpoint(folder: Path, seed: int = 0, dtype=np.float32, shards: int = 1, **changes) -> Path:
    """A Hugging Face folder with random weights; changes: keys of config.json."""
    content = {**BASE_CONFIG, **changes}
    content = {key: value for key, value in content.items() if value is not None or key == "sliding_window"}
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "do_sample": False}))
    make_tokenizer().save(str(folder / "tokenizer.json"))
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2], "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    weights = {k: v.astype(dtype) for k, v in random_weights(ModelConfig.from_dict(content), seed).items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    places = {}
    for i in range(shards):
        part = {name: weights[name] for name in sorted(weights)[i::shards]}
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def peft_tensors(config: ModelConfig, rank: int, modules, seed: int, size: float = 1.0) -> dict[str, np.ndarray]:
    """Random LoRA tensors under PEFT's names for modules whose name ends with one of `modules`."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, (rows, columns) in module_shapes(config).items():
        if name.endswith(tuple(modules)):
            kind = "lora_embedding_{}" if name == "model.embed_tokens" else "lora_{}.weight"
            a, b = rng.standard_normal((rank, columns), np.float32), rng.standard_normal((rows, rank), np.float32)
            prefix = f"base_model.model.{name}."
            tensors[prefix + kind.format("A")] = a * np.float32(size / np.sqrt(columns if columns < 1000 else 100))
            tensors[prefix + kind.format("B")] = b * np.float32(0.5 / np.sqrt(rank))
    return tensors


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")
EVERYTHING = (*LINEAR, "embed_tokens", "lm_head")


def make_adapter(config: ModelConfig, rank: int = 4, modules=LINEAR, seed: int = 1, **settings):
    """A random Adapter."""
    return adapter_from_arrays(
        peft_tensors(config, rank, modules, seed), {"r": rank, "lora_alpha": 2 * rank, **settings}, config
    )


def save_adapter(
    folder: Path,
    config: ModelConfig,
    rank: int = 4,
    modules=("q_proj", "v_proj"),
    seed: int = 1,
    tensors=None,
    **settings,
) -> Path:
    """A PEFT folder; settings: keys of adapter_config.json, tensors: instead of random ones."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(modules),
        "bias": "none",
        **settings,
    }
    (folder / "adapter_config.json").write_text(json.dumps(content))
    save_file(
        peft_tensors(config, rank, modules, seed) if tensors is None else tensors, folder / "adapter_model.safetensors"
    )
    return folder


def load_weights(folder: Path, dtype: str = "auto", group: int = 32):
    """Packed weights of a checkpoint."""
    return pack_in_memory(Plan(open_checkpoint(folder), Target(dtype, group)))


def make_engine(folder_or_weights, dtype: str = "auto", eos=(), **config) -> Engine:
    """An engine on one thread unless told otherwise."""
    weights = load_weights(folder_or_weights, dtype) if isinstance(folder_or_weights, Path) else folder_or_weights
    return Engine(weights, EngineConfig(**{"threads": 1, "max_model_len": 640, "max_num_seqs": 8, **config}), eos)


GREEDY = {"temperature": 0.0, "ignore_eos": True}


def prompt_logits(engine: Engine, tokens: list[int], uses=(), top: int = 20):
    """(sequence after generating one token, log-probabilities of all prompt places)."""
    [sequence] = engine.submit(tokens, SamplingParams(max_tokens=1, prompt_logprobs=top, logprobs=top, **GREEDY), uses)
    outputs = []
    while engine.busy:
        outputs += engine.step()
    return sequence.prompt_logprobs + [output.logprobs for output in outputs if output.sequence is sequence]


def run(engine: Engine, *sequences, check: bool = True):
    """Step until everything is done; returns {sequence: [Output]}."""
    outputs = {}
    while engine.busy:
        for output in engine.step():
            outputs.setdefault(output.sequence, []).append(output)
        if check:
            engine.scheduler.check_integrity()
            engine.adapters.check_integrity()
    return outputs


def random_tokens(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(3, VOCABULARY, count).tolist()


class Odd:
    """A program that does something of its own on one thread, and another program on the others."""

    def __init__(self, thread, act, program):
        self.thread, self.act, self.program = thread, act, program

    def compile(self, types):
        self.program.compile(types)

    def __call__(self, thread, *args):
        return self.act() if thread == self.thread else self.program(thread, *args)


def interrupts_at(line: int, act: Callable[[], object]) -> bool:
    """Call `act` and interrupt it after so many lines, its own and those of what it calls; False where it has fewer."""
    left, interrupted = line, False

    def interrupt(frame, event, arg):
        nonlocal left, interrupted
        left -= 1
        if left == -1:
            interrupted = True
            raise KeyboardInterrupt
        return interrupt

    # A collection of garbage would run callbacks, Hypothesis' for one, which swallow the interrupt.
    gc.disable()
    sys.settrace(interrupt)
    try:
        act()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
        gc.enable()
    return interrupted
