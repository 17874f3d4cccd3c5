"""Adapters as float32, float16 and int8: ranks that fill no word of bytes, and what integers must not hide or lose."""

import numpy as np
import pytest

from minilora.adapters import Adapter, Pair
from minilora.peft import adapter_from_arrays
from minilora.sequence import AdapterUse
from minilora_kernels import reference
from minilora_kernels.cases import CASES
from minilora_kernels.formats import INT8
from minilora_kernels.lora_pack import pack_shrink

from .support import EVERYTHING, load_weights, make_adapter, make_engine, peft_tensors, prompt_logits, random_tokens
from .test_network import largest_error, reference_logprobs

SHRINK, EXPAND, FINELY = (
    next(case for case in CASES if case.name == name) for name in ("shrink int8", "expand int8", "quantize_row_finely")
)


def in_bytes(pair):
    """A pair as int8 numbers with a scale for each row of A and B hold it, ranks of A near 1."""
    size = 2 ** np.rint(np.log2(np.sqrt(np.square(pair.a).mean(axis=1))))
    halves = pair.a / size[:, None], pair.b * size
    scales = [np.abs(half).max(axis=1, keepdims=True) / np.float32(127) for half in halves]
    return Pair(*(np.rint(half / scale) * scale for half, scale in zip(halves, scales, strict=True)))


STORED = {
    "float32": lambda pair: pair,
    "float16": lambda pair: Pair(*(half.astype(np.float16).astype(np.float32) for half in pair)),
    "int8": in_bytes,
}


@pytest.mark.parametrize("rank", [1, 6, 19])
@pytest.mark.parametrize("lora_dtype", STORED)
@pytest.mark.parametrize("name", ["llama", "llama-odd-heads"])
def test_equals_merged_weights(tiny, name, lora_dtype, rank):
    """What storing the numbers costs is left out: the expected update is of the numbers as they are stored."""
    weights, tokens = load_weights(tiny(name)), random_tokens(np.random.default_rng(rank), 40)
    tensors, others = peft_tensors(weights.config, rank, EVERYTHING, rank), {"k_proj": 3, "up_proj": 9, "o_proj": 2}
    for module, other in others.items():
        tensors |= peft_tensors(weights.config, other, (module,), rank)
    settings = {"r": rank, "lora_alpha": 2 * rank, "rank_pattern": others}
    adapter = adapter_from_arrays(tensors, settings, weights.config)
    engine = make_engine(weights, lora_dtype=lora_dtype)
    found = prompt_logits(engine, tokens, (AdapterUse(engine.add_adapter(adapter), 0.5),))
    stored = Adapter({module: STORED[lora_dtype](pair) for module, pair in adapter.pairs.items()})
    expected = reference_logprobs(weights, tokens, engine.length, [(stored, 0.5)])
    error = largest_error(found, expected, tokens)
    assert error < (1e-2 if lora_dtype == "int8" else 2e-4)


def test_a_small_module_beside_a_large_one_keeps_its_digits(tiny):
    """What A of q and of k leave shares a scale: k's A a millionth of q's, its B a million times as large."""
    weights, tokens = load_weights(tiny("llama")), random_tokens(np.random.default_rng(1), 40)
    adapter = make_adapter(weights.config, rank=4, modules=("q_proj", "k_proj"))
    pairs = {m: Pair(p.a * 1e-6, p.b * 1e6) if m.endswith("k_proj") else p for m, p in adapter.pairs.items()}
    texts = []
    for one in (adapter, Adapter(pairs)):
        engine = make_engine(weights, lora_dtype="int8")
        texts.append(prompt_logits(engine, tokens, (AdapterUse(engine.add_adapter(one), 1.0),)))
    places = zip(*texts, strict=True)
    assert max(abs(x.logprob - y.logprob) for x, y in places) < 1e-3


def test_an_a_of_almost_nothing_is_nothing(tiny):
    """The power of two that brings it near 1 would not be a float32."""
    weights, tokens = load_weights(tiny("llama")), random_tokens(np.random.default_rng(1), 10)
    pairs = {module: Pair(pair.a * 0, pair.b) for module, pair in make_adapter(weights.config).pairs.items()}
    next(iter(pairs.values())).a[0, 0] = 1e-45
    engine = make_engine(weights, lora_dtype="int8")
    uses = (AdapterUse(engine.add_adapter(Adapter(pairs)), 1.0),)
    assert prompt_logits(engine, tokens, uses) == prompt_logits(engine, tokens)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_not_finite_is_not_hidden(bad):
    """Integers would hide it: the scales of its group and of the row's shrunk numbers show it, and so does what is added."""
    rng = np.random.default_rng(1)
    arguments = SHRINK.make(rng, {"R": 16, "K": 64, "M": 5, "group": 32})
    x, x_row, s = arguments[6], arguments[7], arguments[10]
    values = rng.standard_normal(64, dtype=np.float32)
    values[7] = bad
    reference.quantize_row_finely(values, 0, 64, 32, x, x_row + 2, 0)
    SHRINK.compiled(*arguments)
    numbers = np.isfinite(reference.from_wide(s.array.reshape(5, 16)))
    assert not numbers[2].any() and numbers[[0, 1, 3, 4]].all()
    arguments = list(EXPAND.make(rng, {"R": 16, "N": 64, "M": 5}))
    arguments[6], arguments[3] = s, 0
    EXPAND.compiled(*arguments)
    out = np.isfinite(arguments[9].array.reshape(5, 64))
    assert not out[2].any() and out[[0, 1, 3, 4]].all()


def test_small_numbers_keep_their_share():
    """Shrunk numbers have 14 bits: beside one of 100 times their size they are right to 0.3%."""
    s = np.full(16, 0.01, np.float32)
    s[3] = 1
    assert np.abs(reference.from_wide(reference.to_wide(s)) - s).max() < 0.5 / (127 * 128) * 1.01
    arguments = SHRINK.make(np.random.default_rng(1), {"R": 16, "K": 64, "M": 1, "group": 32})
    a, x = np.zeros((16, 64), np.float32), np.zeros(64, np.float32)
    a[:, 0], x[0] = s, 2
    reference.quantize_row_finely(x, 0, 64, 32, arguments[6], arguments[7], 0)
    SHRINK.compiled(pack_shrink([a], INT8), *arguments[1:])
    assert np.abs(reference.from_wide(arguments[10].array) - s).max() < 1e-4


@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("count", [1, 4, 8])
def test_the_largest_inputs_of_a_fit_16_bits(group, count):
    """A and inputs at an end of their range in every column."""
    arguments = list(SHRINK.make(np.random.default_rng(1), {"R": 16, "K": 256, "M": count, "group": group}))
    signs = (-1.0) ** np.arange(256, dtype=np.float32)
    for row in range(count):
        FINELY.compiled(signs * 3, 0, 256, group, arguments[6], arguments[7] + row, 0)
    assert set(arguments[6].fine.reshape(-1, arguments[6].stride)[1:, :256].reshape(-1)) == {-127 * 256, 127 * 256}
    arguments[0] = pack_shrink([np.tile(signs, (16, 1))], INT8)
    SHRINK.compiled(*arguments)
    found = reference.from_wide(arguments[10].array.reshape(count, 16))
    assert np.allclose(found, 0.5 * 3 * 256, rtol=1e-4)
