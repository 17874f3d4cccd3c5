"""float32 mode against transformers, for every architecture row: their classes make and save the checkpoints."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..support import (
    ARCHITECTURES,
    BASE_CONFIG,
    load_weights,
    make_engine,
    make_tokenizer,
    prompt_logits,
    random_tokens,
)

MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
    "Phi3ForCausalLM": "phi3",
}
PROMPT = random_tokens(np.random.default_rng(21), 180)


def their_model(folder, seed=0, **changes):
    """A random model of transformers' own class, saved by it."""
    torch.manual_seed(seed)
    content = {k: v for k, v in {**BASE_CONFIG, **changes}.items() if v is not None or k == "sliding_window"}
    [name] = content.pop("architectures")
    content["pad_token_id"] = 0
    config = AutoConfig.for_model(MODEL_TYPES[name], **content)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.2 + ("norm" in key))
    model.save_pretrained(folder)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    return model


def their_logprobs(model, tokens):
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), dim=-1).numpy()


def largest_difference(found, expected):
    errors = [
        abs(logprob - expected[place, token])
        for place, entry in enumerate(found)
        for token, logprob in [(entry.token, entry.logprob), *entry.top]
    ]
    return max(errors)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits(tmp_path, name):
    model = their_model(tmp_path, **ARCHITECTURES[name])
    weights = load_weights(tmp_path)
    engine = make_engine(
        weights, max_num_batched_tokens=64, max_model_len=len(PROMPT) + 1 if name == "llama-dynamic" else 640
    )
    tokens = PROMPT
    if name == "llama-dynamic":
        # Theirs scales by the text's length, ours by the longest text allowed: equal where the two are.
        tokens, engine = PROMPT[:-1], make_engine(weights, max_model_len=len(PROMPT) - 1 + 1)
        engine_length = engine.length
        model(torch.tensor([PROMPT[:1] * engine_length]))
    found = prompt_logits(engine, tokens, top=100)
    assert largest_difference(found, their_logprobs(model, tokens)) < 1e-3


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "smollm3", "phi3", "mistral"])
def test_greedy_texts(tmp_path, name):
    model = their_model(tmp_path, seed=3, **ARCHITECTURES[name])
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        expected = model.generate(torch.tensor([PROMPT[:50]]), max_new_tokens=40, do_sample=False, pad_token_id=0)[
            0
        ].tolist()
    from minilora.params import SamplingParams

    from ..support import GREEDY, run

    engine = make_engine(load_weights(tmp_path), threads=2)
    [sequence] = engine.submit(PROMPT[:50], SamplingParams(max_tokens=40, **GREEDY))
    run(engine)
    assert sequence.tokens == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints(tmp_path, dtype):
    """Stored in 16 bits, computed in float32: as transformers computes the same weights in float32."""
    their_model(tmp_path).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    engine = make_engine(load_weights(tmp_path), kv_cache_dtype="float32")
    found = prompt_logits(engine, PROMPT, top=100)
    assert largest_difference(found, their_logprobs(model, PROMPT)) < 1e-3


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantised_weights(tmp_path, dtype):
    """transformers on our dequantised weights: what is left is the rounding of activations."""
    model = their_model(tmp_path)
    weights = load_weights(tmp_path, dtype)
    floats = weights.floats()
    model.load_state_dict({key: torch.tensor(np.ascontiguousarray(floats[key])) for key in model.state_dict()})
    found = prompt_logits(make_engine(weights), PROMPT, top=100)
    expected = their_logprobs(model, PROMPT)
    assert largest_difference(found, expected) < 0.6
    same = np.mean([entry.top[0][0] == expected[place].argmax() for place, entry in enumerate(found)])
    assert same > 0.9
