"""The default model with its adapters: parity with transformers and PEFT by goldens, and what quantisation costs."""

import json
from pathlib import Path

import numpy as np
import pytest

from minilora import LLM, LoRARequest, SamplingParams
from minilora.checkpoint import open_checkpoint
from minilora.checkpoint.resolve import entries, resolve_model
from minilora.engine import Engine
from minilora.params import EngineConfig
from minilora.tokenizer import Tokenizer

pytestmark = pytest.mark.real

MODEL = "smollm2-135m-instruct"
HERE = Path(__file__).resolve().parent
ADAPTERS = ["base", *entries("adapters")]


@pytest.fixture(scope="module")
def golden():
    """What transformers and PEFT computed."""
    path = HERE / "goldens" / "real.json"
    assert path.exists(), f"there is no {path.relative_to(HERE.parent)}: tools/make_goldens.py writes it"
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def exact():
    """The model in float32 with all its adapters."""
    llm = LLM(MODEL, dtype="float32", max_model_len=1024, lora={name: name for name in ADAPTERS[1:]})
    yield llm
    llm.close()


def request(name):
    return None if name == "base" else LoRARequest(name)


@pytest.mark.parametrize("name", ADAPTERS)
def test_float32_equals_transformers_and_peft(exact, golden, name):
    params = SamplingParams(temperature=0, max_tokens=24, prompt_logprobs=8)
    prompts = [{"prompt_token_ids": ids} for ids in golden["prompts"]]
    for output, expected in zip(exact.generate(prompts, params, request(name)), golden["results"][name], strict=True):
        assert output.outputs[0].token_ids == expected["text"]
        # The last place of theirs is the text's first token.
        places = zip(expected["tokens"][:-1], expected["logprobs"][:-1], output.prompt_logprobs[1:], strict=True)
        for tokens, logprobs, found in places:
            assert {*tokens} <= {*found} and len(tokens) == 5
            assert [found[token].logprob for token in tokens] == pytest.approx(logprobs, rel=0, abs=1e-3)


def test_a_mixed_batch_equals_each_alone(exact, golden):
    """All prompts with all adapters in one batch: the golden texts."""
    pairs = [
        (ids, name, expected["text"])
        for name in ADAPTERS
        for ids, expected in zip(golden["prompts"], golden["results"][name], strict=True)
    ]
    outputs = exact.generate(
        [{"prompt_token_ids": ids} for ids, _, _ in pairs],
        SamplingParams(temperature=0, max_tokens=24),
        [request(name) for _, name, _ in pairs],
    )
    assert [output.outputs[0].token_ids for output in outputs] == [text for _, _, text in pairs]


def test_the_fruits():
    llm = LLM(MODEL, max_model_len=512)
    [output] = llm.chat(
        [{"role": "user", "content": "Name three fruits."}], SamplingParams(temperature=0, max_tokens=40)
    )
    llm.close()
    assert output.outputs[0].text == "1. Bananas\n2. Oranges\n3. Grapes" and output.outputs[0].finish_reason == "stop"


def log_softmax(x):
    x = x.astype(np.float64) - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def all_logprobs(model, tokens):
    """log-probabilities of the whole vocabulary at every place."""
    engine = Engine(model.weights, EngineConfig(max_model_len=1024, max_num_seqs=1))
    rows = []
    engine.submit(tokens, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))
    while engine.busy:
        before = engine.scheduler.running[0].computed if engine.scheduler.running else 0
        engine.step()
        rows.append(engine.runner.sampler.logits(min(64, len(tokens) - before)).copy())
    engine.close()
    return log_softmax(np.concatenate(rows)[: len(tokens)])


def test_what_quantised_activations_cost(exact, real_model):
    """The file's own weights: mean KL, agreement of the best token and perplexity against exact arithmetic."""
    tokens = real_model.tokenizer.encode((HERE / "data" / "prose.txt").read_text())[:512]
    p, q = all_logprobs(exact.model, tokens), all_logprobs(real_model, tokens)
    kl = (np.exp(p) * (p - q)).sum(axis=1).mean()
    same = (p.argmax(axis=1) == q.argmax(axis=1)).mean()
    places, following = np.arange(len(tokens) - 1), np.array(tokens[1:])
    perplexity = [np.exp(-x[places, following].mean()) for x in (p, q)]
    assert kl < 4e-3 and same > 0.95 and abs(perplexity[1] / perplexity[0] - 1) < 0.01, (kl, same, perplexity)


def test_logprobs_in_vllms_shape(real_model):
    llm = LLM(MODEL, max_model_len=512)
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=1, n=2)
    [output] = llm.generate("The capital of France is", params)
    llm.close()
    assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(output.prompt_token_ids)
    for place, token in enumerate(output.prompt_token_ids[1:], 1):
        assert output.prompt_logprobs[place][token].rank >= 1
    for text in output.outputs:
        assert len(text.logprobs) == len(text.token_ids) == 3
        assert text.cumulative_logprob == pytest.approx(
            sum(at[t].logprob for at, t in zip(text.logprobs, text.token_ids, strict=True))
        )
        assert all(at[t].rank == 1 and at[t].decoded_token for at, t in zip(text.logprobs, text.token_ids, strict=True))


HARD = {
    "1234567890": [33, 34, 35, 36, 37, 38, 39, 40, 41, 32],
    " 3.14": [216, 35, 30, 33, 36],
    "<|im_start|>user\n": [1, 4093, 198],
}


def test_digits_are_split_one_by_one(real_model):
    tokenizer = Tokenizer(open_checkpoint(resolve_model(MODEL, print)).tokenizer())
    for text, ids in HARD.items():
        assert tokenizer.encode(text) == ids == real_model.tokenizer.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
