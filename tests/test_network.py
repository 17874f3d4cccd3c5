"""The compiled step against the NumPy reference network, for every architecture, format and kind of adapter."""

import numpy as np
import pytest

from minilora.model.head import NONE, better
from minilora.params import SamplingParams
from minilora.reference import Reference
from minilora.sequence import AdapterUse
from minilora_kernels.floats import narrow_bfloat16, widen_bfloat16
from minilora_kernels.jit import kernel, program

from .support import (
    ARCHITECTURES,
    GREEDY,
    LINEAR,
    load_weights,
    make_adapter,
    make_checkpoint,
    make_engine,
    prompt_logits,
    random_tokens,
    run,
)


def log_softmax(x):
    x = x.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


class RoundedInputs(Reference):
    """The inputs of products are bfloat16."""

    def linear(self, x, name):
        return super().linear(widen_bfloat16(narrow_bfloat16(x)), name)


def reference_logprobs(weights, tokens, length, adapters=(), network=Reference):
    floats = weights.floats()
    for adapter, scale in adapters:
        for module, (a, b) in adapter.pairs.items():
            update = (b @ a).T if module == "model.embed_tokens" else b @ a
            floats[f"{module}.weight"] = floats[f"{module}.weight"] + np.float32(scale) * update
    return log_softmax(network(weights.config, floats, length).forward(tokens))


def largest_error(found, expected, tokens):
    """Over the tokens that are there and the best ones at each place."""
    errors = []
    for place, entry in enumerate(found):
        pairs = [(entry.token, entry.logprob), *entry.top]
        errors += [abs(logprob - expected[place, token]) for token, logprob in pairs]
    return max(errors)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_equals_the_reference(tiny, name):
    weights = load_weights(tiny(name))
    engine = make_engine(weights, max_num_batched_tokens=64)
    tokens = random_tokens(np.random.default_rng(1), 150)
    found = prompt_logits(engine, tokens)
    assert largest_error(found, reference_logprobs(weights, tokens, engine.length), tokens) < 2e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("length", [7, 150])
def test_it_does_not_matter_whose_logits_are_wanted(tiny, name, threads, length):
    """A text goes on bit for bit as it does where its prompt's log-probabilities are asked for too."""
    weights = load_weights(tiny(name))
    prompt, texts = random_tokens(np.random.default_rng(4), length), []
    for wanted in (None, 0):
        engine = make_engine(weights, max_num_batched_tokens=128, threads=threads)
        params = SamplingParams(max_tokens=4, logprobs=3, prompt_logprobs=wanted, **GREEDY)
        [sequence] = engine.submit(prompt, params)
        texts.append([output.logprobs for output in run(engine)[sequence]])
    assert texts[0] == texts[1] and len(texts[0]) == 4


def test_texts_longer_than_a_split(tiny):
    weights = load_weights(tiny("qwen3"))
    engine = make_engine(weights)
    tokens = random_tokens(np.random.default_rng(2), 600)
    found = prompt_logits(engine, tokens)
    assert largest_error(found, reference_logprobs(weights, tokens, engine.length), tokens) < 2e-4


@pytest.mark.parametrize(
    "dtype, kv, bound",
    [
        ("float16", "float32", 1e-3),
        ("bfloat16", "float32", 1e-3),
        ("float32", "float16", 0.02),
        ("float32", "int8", 0.2),
        ("int8", "auto", 0.3),
        ("int4", "auto", 0.3),
    ],
)
def test_formats_equal_the_reference_on_their_own_weights(tiny, dtype, kv, bound):
    weights = load_weights(tiny("llama"), dtype)
    engine = make_engine(weights, kv_cache_dtype=kv)
    tokens = random_tokens(np.random.default_rng(3), 100)
    found = prompt_logits(engine, tokens)
    assert largest_error(found, reference_logprobs(weights, tokens, engine.length), tokens) < bound


def test_inputs_are_rounded_where_the_format_says_so(tiny):
    """But for those that fall to the other side of half a step, and what they round then."""
    weights = load_weights(tiny("llama"), "bfloat16+inputs")
    engine = make_engine(weights, kv_cache_dtype="float32")
    tokens = random_tokens(np.random.default_rng(3), 100)
    found = prompt_logits(engine, tokens)
    rounded, exact = (
        largest_error(found, reference_logprobs(weights, tokens, engine.length, network=network), tokens)
        for network in (RoundedInputs, Reference)
    )
    assert rounded < 0.01 < exact < 0.1


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("group", [16, 64, 128])
def test_other_groups_equal_the_reference_on_their_own_weights(tmp_path, dtype, group):
    """With several threads, who help each other with gate up by whole groups, the numbers are the same."""
    weights = load_weights(make_checkpoint(tmp_path, hidden_size=256, intermediate_size=2176), dtype, group)
    tokens = random_tokens(np.random.default_rng(3), 100)
    engines = [make_engine(weights, threads=threads) for threads in (1, 2)]
    one, two = (prompt_logits(engine, tokens) for engine in engines)
    assert largest_error(one, reference_logprobs(weights, tokens, engines[0].length), tokens) < 0.3
    assert one == two


@pytest.mark.parametrize("dtype, bound", [("int8", 0.01), ("int4", 0.12)])
def test_quantisation_keeps_the_weights(tiny, dtype, bound):
    exact, rounded = load_weights(tiny("llama")).floats(), load_weights(tiny("llama"), dtype).floats()
    for name, weight in exact.items():
        error = np.linalg.norm(rounded[name] - weight) / np.linalg.norm(weight)
        # Embedding and head have 8 bits in both, norms are as they were.
        most = 0.01 if name in ("model.embed_tokens.weight", "lm_head.weight") else bound * (weight.ndim == 2)
        assert most / 10 <= error <= most, name


ADAPTERS = {
    "attention": dict(rank=4, modules=("q_proj", "v_proj", "qkv_proj")),
    "rank one": dict(rank=1, modules=("o_proj",)),
    "all linear": dict(rank=16, modules=LINEAR),
    "high rank": dict(rank=64, modules=("down_proj", "up_proj", "gate_up_proj")),
    "rslora": dict(rank=9, modules=LINEAR, use_rslora=True),
    "embedding": dict(rank=5, modules=("embed_tokens",)),
    "head": dict(rank=7, modules=("lm_head", "k_proj", "qkv_proj")),
    "patterns": dict(rank=4, modules=LINEAR, alpha_pattern={"0.self_attn.q_proj": 1, "down_proj": 32}),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("name", ["llama", "phi3", "llama-tied"])
def test_adapters_equal_merged_weights(tiny, name, kind):
    weights = load_weights(tiny(name))
    adapter = make_adapter(weights.config, **ADAPTERS[kind])
    engine = make_engine(weights, max_num_batched_tokens=48)
    digest = engine.add_adapter(adapter)
    tokens = random_tokens(np.random.default_rng(4), 70)
    found = prompt_logits(engine, tokens, (AdapterUse(digest, 0.75),))
    expected = reference_logprobs(weights, tokens, engine.length, [(adapter, 0.75)])
    assert largest_error(found, expected, tokens) < 5e-4
    plain = reference_logprobs(weights, tokens, engine.length)
    assert largest_error(found, plain, tokens) > 0.05, "the adapter has no effect"


def test_several_adapters_in_one_request(tiny):
    weights = load_weights(tiny("llama"))
    one, other = (
        make_adapter(weights.config, rank=3, seed=5),
        make_adapter(weights.config, rank=8, seed=6, modules=("o_proj", "up_proj", "lm_head")),
    )
    engine = make_engine(weights)
    uses = (AdapterUse(engine.add_adapter(one), 0.5), AdapterUse(engine.add_adapter(other), -1.25))
    tokens = random_tokens(np.random.default_rng(5), 60)
    found = prompt_logits(engine, tokens, uses)
    expected = reference_logprobs(weights, tokens, engine.length, [(one, 0.5), (other, -1.25)])
    assert largest_error(found, expected, tokens) < 5e-4


@pytest.mark.parametrize(
    "dtype, group, bound",
    [("int8", 32, 0.4), ("int4", 32, 0.4), ("int4", 16, 0.4), ("bfloat16", 32, 0.05), ("bfloat16+inputs", 32, 0.15)],
)
@pytest.mark.parametrize("lora_dtype", ["int8", "float16"])
def test_adapters_on_other_weights(tiny, dtype, group, bound, lora_dtype):
    weights = load_weights(tiny("llama"), dtype, group)
    adapter = make_adapter(weights.config, rank=8)
    engine = make_engine(weights, lora_dtype=lora_dtype)
    tokens = random_tokens(np.random.default_rng(6), 60)
    found = prompt_logits(engine, tokens, (AdapterUse(engine.add_adapter(adapter), 1.0),))
    expected = reference_logprobs(weights, tokens, engine.length, [(adapter, 1.0)])
    assert largest_error(found, expected, tokens) < (0.4 if lora_dtype == "int8" else bound)


@kernel
def _best_of(x, columns):
    best = NONE
    for column in columns:
        best = better(x, 0, best, column)
    return best


@pytest.mark.parametrize("bad", [(), (np.nan,), (np.nan, np.inf, -np.inf)])
def test_columns_in_any_order_have_the_same_best(bad):
    best_of, rng = program(_best_of), np.random.default_rng(5)
    for _ in range(200):
        x = rng.integers(0, 3, 12).astype(np.float32)
        x[rng.choice(12, 2 * len(bad), replace=False)] = 2 * bad
        assert best_of(x, rng.permutation([NONE, *range(12)])) == np.argmax(x)
    assert best_of(x, np.array([NONE, NONE])) == NONE
