"""Adapters against PEFT: their classes make and save them, every kind of rank and target, alone and in mixed batches."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from minilora.params import SamplingParams
from minilora.peft import load_adapter
from minilora.sequence import AdapterUse

from ..support import ARCHITECTURES, GREEDY, load_weights, make_engine, prompt_logits, random_tokens, run
from .test_transformers import largest_difference, their_logprobs, their_model

PROMPT = random_tokens(np.random.default_rng(22), 90)

KINDS = {
    "q and v": dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    "all linear, rank 1": dict(r=1, lora_alpha=1, target_modules="all-linear"),
    "all linear, rank 33": dict(r=33, lora_alpha=20, target_modules="all-linear"),
    "rank 256": dict(r=256, lora_alpha=64, target_modules=["o_proj"]),
    "rslora": dict(r=5, lora_alpha=7, target_modules=["down_proj", "up_proj"], use_rslora=True),
    "patterns": dict(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "o_proj"],
        rank_pattern={"q_proj": 9},
        alpha_pattern={"layers.1.self_attn.o_proj": 30},
    ),
    "one layer": dict(r=4, lora_alpha=8, target_modules=["k_proj", "gate_proj"], layers_to_transform=[1]),
    "a pattern of targets": dict(r=4, lora_alpha=8, target_modules=r".*layers\.0\.self_attn\.(q|k)_proj"),
    "embedding and head": dict(r=6, lora_alpha=12, target_modules=["embed_tokens", "lm_head", "v_proj"]),
}


def make_peft(base_folder, folder, seed=5, **settings):
    """A random adapter, saved by PEFT; returns their model with it."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * (0.5 / parameter.shape[1] ** 0.5))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    their_model(folder, **ARCHITECTURES["llama"])
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_adapters(base, tmp_path, kind):
    model = make_peft(base, tmp_path, **KINDS[kind])
    weights = load_weights(base)
    engine = make_engine(weights)
    adapter = load_adapter(tmp_path, weights.config, weights)
    found = prompt_logits(engine, PROMPT, (AdapterUse(engine.add_adapter(adapter), 1.0),), top=100)
    expected = their_logprobs(model, PROMPT)
    assert largest_difference(found, expected) < 1e-3
    with model.disable_adapter():
        assert np.abs(their_logprobs(model, PROMPT) - expected).max() > 0.05, "the adapter has no effect"


@pytest.mark.parametrize(
    "name, targets",
    [
        ("phi3", ["qkv_proj", "gate_up_proj", "down_proj"]),
        ("qwen2", ["q_proj", "k_proj", "v_proj"]),
        ("qwen3", "all-linear"),
        ("llama-tied", ["q_proj", "lm_head"]),
        ("smollm3", "all-linear"),
        ("mistral", "all-linear"),
    ],
)
def test_other_architectures(tmp_path, name, targets):
    their_model(tmp_path / "base", **ARCHITECTURES[name])
    model = make_peft(tmp_path / "base", tmp_path / "adapter", r=7, lora_alpha=9, target_modules=targets)
    weights = load_weights(tmp_path / "base")
    engine = make_engine(weights)
    adapter = load_adapter(tmp_path / "adapter", weights.config, weights)
    found = prompt_logits(engine, PROMPT, (AdapterUse(engine.add_adapter(adapter), 1.0),), top=100)
    assert largest_difference(found, their_logprobs(model, PROMPT)) < 1e-3


def test_a_mixed_batch_equals_peft_one_by_one(base, tmp_path):
    weights = load_weights(base)
    engine = make_engine(weights, max_num_seqs=16, max_num_batched_tokens=100, threads=2)
    expected, sequences = [], []
    rng = np.random.default_rng(1)
    prompts = [random_tokens(rng, int(rng.integers(5, 80))) for _ in range(2 * len(KINDS))]
    for i, settings in enumerate(list(KINDS.values()) * 2):
        model = make_peft(base, tmp_path / str(i), seed=i, **settings)
        model.generation_config.eos_token_id = None
        with torch.no_grad():
            out = model.generate(
                input_ids=torch.tensor([prompts[i]]), max_new_tokens=15, do_sample=False, pad_token_id=0
            )
        expected.append(out[0].tolist())
        digest = engine.add_adapter(load_adapter(tmp_path / str(i), weights.config, weights))
        sequences += engine.submit(prompts[i], SamplingParams(max_tokens=15, **GREEDY), (AdapterUse(digest, 1.0),))
    run(engine)
    assert [sequence.tokens for sequence in sequences] == expected


def test_several_weighted_adapters(base, tmp_path):
    """As PEFT computes them with several active adapters, each with a scale of its own."""
    weights = load_weights(base)
    one = make_peft(base, tmp_path / "one", seed=1, **KINDS["q and v"])
    make_peft(base, tmp_path / "two", seed=2, **KINDS["all linear, rank 33"])
    one.load_adapter(tmp_path / "two", "two")
    one.base_model.set_adapter(["default", "two"])
    for module in one.modules():
        if hasattr(module, "scaling") and isinstance(module.scaling, dict):
            for name, factor in (("default", 0.5), ("two", 1.5)):
                if name in module.scaling:
                    module.scaling[name] *= factor
    engine = make_engine(weights)
    uses = tuple(
        AdapterUse(engine.add_adapter(load_adapter(tmp_path / name, weights.config, weights)), scale)
        for name, scale in (("one", 0.5), ("two", 1.5))
    )
    assert largest_difference(prompt_logits(engine, PROMPT, uses, top=100), their_logprobs(one.eval(), PROMPT)) < 1e-3


def test_unsupported_kinds_are_refused(base, tmp_path):
    from minilora.errors import MiniloraError

    config = load_weights(base).config
    for i, settings in enumerate(
        [
            dict(use_dora=True),
            dict(bias="lora_only"),
            dict(modules_to_save=["lm_head"]),
            dict(trainable_token_indices=[1, 2]),
        ]
    ):
        make_peft(base, tmp_path / str(i), r=4, target_modules=["q_proj"], **settings)
        with pytest.raises(MiniloraError):
            load_adapter(tmp_path / str(i), config)


def test_peft_reads_what_we_read(base, tmp_path):
    """The same folder through PEFT's own loader gives the same numbers as ours."""
    make_peft(base, tmp_path, **KINDS["patterns"])
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager"), tmp_path
    ).eval()
    weights = load_weights(base)
    engine = make_engine(weights)
    digest = engine.add_adapter(load_adapter(tmp_path, weights.config, weights))
    assert (
        largest_difference(
            prompt_logits(engine, PROMPT, (AdapterUse(digest, 1.0),), top=100), their_logprobs(loaded, PROMPT)
        )
        < 1e-3
    )
