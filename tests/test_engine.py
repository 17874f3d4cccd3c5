"""The engine: sampling parameters, ends of texts, pages, prefix cache, copies, cancellation."""

import math
import struct
import threading
from collections import Counter

import numpy as np
import pytest

from minilora import LLM, memory
from minilora.batch import Draw
from minilora.errors import EngineClosedError, ResourceError, UnloadedError, UsageError
from minilora.params import EngineConfig, SamplingParams
from minilora.sampler import alter
from minilora.sequence import AdapterUse
from minilora_kernels import limits

from .support import (
    GREEDY,
    VOCABULARY,
    interrupts_at,
    load_weights,
    make_adapter,
    make_engine,
    random_tokens,
    run,
    save_adapter,
)

PROMPT = random_tokens(np.random.default_rng(11), 40)


@pytest.fixture(scope="module")
def weights(tiny):
    return load_weights(tiny("llama"))


def text_of(weights, params, prompt=PROMPT, eos=(), **config):
    engine = make_engine(weights, eos=eos, **config)
    [sequence, *_] = engine.submit(prompt, params)
    run(engine)
    assert engine.pool.held == 0, "all pages are free again"
    return sequence


def generated(sequence):
    return sequence.tokens[sequence.prompt_length :]


# ---------------------------------------------------------------- parameters

BAD = [
    {"n": 0},
    {"n": True},
    {"n": 1.0},
    {"n": 10**9},
    {"temperature": -0.1},
    {"temperature": math.nan},
    {"temperature": math.inf},
    {"temperature": "1"},
    {"temperature": True},
    {"top_p": 0},
    {"top_p": 1.1},
    {"top_p": math.nan},
    {"top_k": -2},
    {"top_k": 1.5},
    {"top_k": 1 << 63},
    {"min_p": -0.1},
    {"min_p": 1.5},
    {"repetition_penalty": 0},
    {"repetition_penalty": math.inf},
    {"presence_penalty": 3},
    {"frequency_penalty": -3},
    {"seed": 1 << 64},
    {"seed": 1.5},
    {"max_tokens": 0},
    {"max_tokens": 10**30},
    {"min_tokens": -1},
    {"min_tokens": 20, "max_tokens": 10},
    {"logprobs": -1},
    {"logprobs": 1000},
    {"prompt_logprobs": True},
    {"stop": [""]},
    {"stop": ["x"] * 100},
    {"stop": ["x" * 10**6]},
    {"stop": [1]},
    {"stop": 5},
    {"stop_token_ids": 5},
    {"logits_processors": 5},
    {"stop_token_ids": [-1]},
    {"stop_token_ids": [True]},
    {"ignore_eos": 1},
    {"logit_bias": {1: math.nan}},
    {"logit_bias": {1: 101}},
    {"logit_bias": {-1: 1}},
    {"logit_bias": {"a": 1}},
    {"logit_bias": [1]},
    {"logit_bias": dict.fromkeys(range(5000), 0)},
]


def test_the_wrong_processor_is_named():
    with pytest.raises(UsageError, match=r"logits_processors\[1\] is not callable") as caught:
        SamplingParams(logits_processors=[print, 5])
    assert caught.value.param == "logits_processors"


def test_memory_for_less_than_a_page_is_named(weights, monkeypatch):
    """The option where it is the option that is too small, else the free memory."""
    page = 2 * 2 * 2 * 32 * 16 * 4
    with pytest.raises(ResourceError, match=f"kv_cache_memory is 1024 bytes, but one page takes {page}\nRaise it"):
        make_engine(weights, kv_cache_memory=1024)
    monkeypatch.setattr("minilora.runner.free_memory", lambda: 2000)
    with pytest.raises(ResourceError, match=f"free memory, 1000 bytes, does not hold one KV page of {page} bytes"):
        make_engine(weights)


@pytest.mark.parametrize("values", BAD, ids=repr)
def test_bad_parameters_are_refused(values):
    with pytest.raises(UsageError, match=next(iter(values)).split("_")[0]):
        SamplingParams(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"max_num_seqs": 0},
        {"block_size": 16},
        {"block_size": 48},
        {"kv_cache_dtype": "int3"},
        {"threads": 0},
        {"max_lora_rank": 300},
        {"enable_prefix_caching": "no"},
        {"debug_checks": 1},
    ],
)
def test_bad_engine_settings_are_refused(values):
    with pytest.raises(UsageError):
        EngineConfig(**values)


@pytest.mark.parametrize(
    "name, hint", [("enable_lora", "always on"), ("lora_modules", "--lora"), ("max_lora", "'max_loras'")]
)
def test_unknown_settings_are_answered(name, hint):
    with pytest.raises(UsageError, match=name) as caught:
        LLM(**{name: True})
    assert hint in caught.value.remedy


@pytest.mark.parametrize(
    "tokens, params",
    [
        ([], {}),
        ([VOCABULARY], {}),
        ([-1], {}),
        ([5] * 640, {}),
        ([5] * 10**6, {}),
        (PROMPT, {"stop_token_ids": [VOCABULARY]}),
        (PROMPT, {"logit_bias": {VOCABULARY: 1}}),
        (PROMPT, {"n": 9}),
    ],
)
def test_impossible_requests_are_refused_at_once(weights, tokens, params):
    with pytest.raises(UsageError):
        make_engine(weights).submit(tokens, SamplingParams(**params))


@pytest.mark.parametrize(
    "order",
    [{"priority": None}, {"priority": "high"}, {"priority": 1.5}, {"salt": "text"}, {"tenant": ["x"]}],
    ids=repr,
)
def test_who_can_not_be_put_in_order_is_refused(weights, order):
    """At once: later it would end the engine, with everybody's requests."""
    engine = make_engine(weights, max_num_seqs=1)
    engine.submit(PROMPT, SamplingParams(max_tokens=3))
    with pytest.raises(UsageError, match=next(iter(order))):
        engine.submit(PROMPT, SamplingParams(max_tokens=3), **order)
    engine.submit(PROMPT, SamplingParams(max_tokens=3))
    run(engine)
    assert engine.stats().total.requests == 2


def test_the_first_adapter_says_who_shares_and_how_much(weights):
    engine = make_engine(weights)
    uses = [AdapterUse(engine.add_adapter(make_adapter(weights.config, seed=i), f"a{i}", 2.0 + i), 1.0) for i in (0, 1)]
    for some, tenant, expected in (((), None, ("", 1.0)), (uses, None, ("a0", 2.0)), (uses[1:], "me", ("me", 3.0))):
        [sequence] = engine.submit(PROMPT, SamplingParams(max_tokens=1), tuple(some), tenant=tenant)
        assert (sequence.tenant, sequence.weight) == expected
    run(engine)


def test_a_closed_engine_takes_nothing(weights):
    engine = make_engine(weights, threads=2)
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.submit(PROMPT, SamplingParams())


def test_all_texts_of_a_request_wait(weights):
    engine = make_engine(weights, max_num_seqs=4)
    engine.submit(PROMPT, SamplingParams(n=4, max_tokens=2))
    stats = engine.stats()
    assert stats.waiting == stats.load_by_adapter[""].waiting == stats.total.requests == 4
    run(engine)


def test_texts_go_on_while_an_adapter_is_read(weights, tmp_path, monkeypatch):
    """With one row in a step, every other step finds nothing to do."""
    engine, gate = make_engine(weights, max_num_batched_tokens=1), threading.Event()
    read = engine.adapters.loader._read
    monkeypatch.setattr(engine.adapters.loader, "_read", lambda path: gate.wait(30) and read(path))
    [text] = engine.submit([5], SamplingParams(max_tokens=20, **GREEDY))
    engine.step()
    version = engine.add_adapter(save_adapter(tmp_path, weights.config), "slow")
    engine.submit([5], SamplingParams(max_tokens=1), (AdapterUse(version, 1.0),))
    while text.finish_reason is None:
        engine.step()
        assert not engine.stalled or text.finish_reason is not None
        assert engine.adapters.loading
    gate.set()
    while engine.busy:
        engine.step()
        engine.wait(30)
    engine.close()


def test_all_texts_that_wait_for_an_adapter_are_counted(weights, tmp_path, monkeypatch):
    engine, gate = make_engine(weights, max_num_seqs=4), threading.Event()
    read = engine.adapters.loader._read
    monkeypatch.setattr(engine.adapters.loader, "_read", lambda path: gate.wait(30) and read(path))
    version = engine.add_adapter(save_adapter(tmp_path, weights.config), "slow")
    engine.submit(PROMPT, SamplingParams(n=4, max_tokens=1), (AdapterUse(version, 1.0),))
    engine.step()
    stats = engine.stats()
    assert stats.waiting == stats.waiting_for_adapters == 4
    gate.set()
    while engine.busy:
        engine.step()
        engine.wait(30)
    assert engine.stats().waiting_for_adapters == 0
    engine.close()


def test_steps_without_work_between_others_are_in_order(weights):
    """With one row in a step, every other one is kept for a text that waits, here for the only place of an adapter."""
    engine = make_engine(weights, max_num_batched_tokens=1, max_loras=1, num_scheduler_steps=1)
    texts = []
    for seed in range(2):
        use = AdapterUse(engine.add_adapter(make_adapter(weights.config, seed=seed)), 1.0)
        texts += engine.submit([5], SamplingParams(max_tokens=40, **GREEDY), (use,))
    run(engine)
    assert [text.generated for text in texts] == [40, 40]


def test_adapters_are_read_while_their_requests_wait_for_a_place(weights, tmp_path):
    engine = make_engine(weights, max_num_seqs=1)
    engine.submit([5], SamplingParams(max_tokens=20, **GREEDY))
    engine.step()
    known = engine.add_adapter(make_adapter(weights.config), "known")
    version = engine.add_adapter(save_adapter(tmp_path, weights.config), "next")
    engine.submit([5], SamplingParams(max_tokens=1), (AdapterUse(known, 0.5), AdapterUse(version, 0.5)))
    engine.step()
    assert engine.stats().waiting_for_adapters == 1
    run(engine)
    engine.close()


def test_an_interrupt_while_an_adapter_is_waited_for(weights, tmp_path, monkeypatch):
    """At any line of `wait` and of what it uses, one after the other: the thread that reads can still say so."""
    engine, gate = make_engine(weights), threading.Event()
    read = engine.adapters.loader._read
    monkeypatch.setattr(engine.adapters.loader, "_read", lambda path: gate.wait(30) and read(path))
    version = engine.add_adapter(save_adapter(tmp_path, weights.config), "slow")
    engine.submit([5], SamplingParams(max_tokens=1), (AdapterUse(version, 1.0),))
    engine.step()
    lines, interrupted = 0, True
    while interrupted:
        lines, interrupted = lines + 1, interrupts_at(lines, lambda: engine.wait(0.01))
        speaker = threading.Thread(target=engine.adapters.loader.wake, daemon=True)
        speaker.start()
        speaker.join(10)
        assert not speaker.is_alive()
        engine.step()
    assert lines > 3
    gate.set()
    while engine.busy:
        engine.step()
        engine.wait(30)
    engine.close()


def test_a_request_that_can_never_fit_is_refused(weights):
    engine = make_engine(weights, kv_cache_memory=3 * 2 * 2 * 2 * 32 * 16 * 4)
    with pytest.raises(UsageError, match="do not fit"):
        engine.submit(PROMPT, SamplingParams(max_tokens=100))
    engine.submit(PROMPT, SamplingParams(max_tokens=3 * 32 - len(PROMPT), ignore_eos=True))
    run(engine)


# ---------------------------------------------------------------- ends


def test_length_and_model_length(weights):
    assert len(generated(text_of(weights, SamplingParams(max_tokens=7, **GREEDY)))) == 7
    for most in (None, 25, 1000):
        sequence = text_of(weights, SamplingParams(max_tokens=most, **GREEDY), max_model_len=64)
        assert len(sequence.tokens) == 64 and sequence.finish_reason == "length"


def test_a_length_beyond_the_models_positions_is_refused(weights):
    assert make_engine(weights, max_model_len=1024).length == 1024
    with pytest.raises(UsageError, match="1025") as caught:
        make_engine(weights, max_model_len=1025)
    assert "trained" in caught.value.remedy


def test_eos_stop_tokens_and_min_tokens(weights):
    free = generated(text_of(weights, SamplingParams(max_tokens=12, **GREEDY)))
    end = free[4]
    first = free.index(end)
    stopped = text_of(weights, SamplingParams(max_tokens=12, temperature=0), eos=[end])
    assert generated(stopped) == free[: first + 1] and stopped.finish_reason == "stop" and stopped.stop_token is None
    stopped = text_of(weights, SamplingParams(max_tokens=12, temperature=0, stop_token_ids=[end]))
    assert generated(stopped) == free[: first + 1] and stopped.stop_token == end
    assert generated(text_of(weights, SamplingParams(max_tokens=12, **GREEDY), eos=[end])) == free
    least = text_of(weights, SamplingParams(max_tokens=12, temperature=0, min_tokens=first), eos=[end])
    assert generated(least) == free[: first + 1], "it may come after so many"
    for stops, eos in (((), [end]), ((end,), ())):
        params = SamplingParams(max_tokens=12, temperature=0, min_tokens=9, stop_token_ids=stops)
        longer = text_of(weights, params, eos=eos)
        assert end not in generated(longer)[:9] and len(generated(longer)) >= 9


# ---------------------------------------------------------------- choices


def test_seeds(weights):
    def draw(seed, **config):
        return generated(text_of(weights, SamplingParams(max_tokens=20, seed=seed, ignore_eos=True), **config))

    assert draw(1) == draw(1) == draw(1, threads=2) and draw(1) != draw(2)
    assert generated(text_of(weights, SamplingParams(max_tokens=20, ignore_eos=True))) != generated(
        text_of(weights, SamplingParams(max_tokens=20, ignore_eos=True))
    )


@pytest.mark.parametrize("kind", ["auto", "int8"])
def test_n_texts_differ_and_equal_their_own_seeds(weights, kind):
    """Each has a copy of the prompt's last page, with the scales of its numbers where they have some."""
    engine = make_engine(weights, kv_cache_dtype=kind)
    several = engine.submit(
        PROMPT, SamplingParams(n=4, seed=5, max_tokens=10, ignore_eos=True, logprobs=1, prompt_logprobs=0)
    )
    outputs = run(engine)
    texts = [generated(sequence) for sequence in several]
    assert len({tuple(text) for text in texts}) == 4
    for i, text in enumerate(texts):
        own = SamplingParams(seed=5 + i, max_tokens=10, ignore_eos=True)
        assert text == generated(text_of(weights, own, kv_cache_dtype=kind))
        assert len(outputs[several[i]]) == 10 and len(several[i].prompt_logprobs) == len(PROMPT) - 1
    assert engine.pool.held == 0


def test_n_texts_share_the_start_and_the_cached_part_of_their_prompt(weights):
    engine, params = make_engine(weights), SamplingParams(n=4, max_tokens=2, ignore_eos=True)
    for found in (0, 64):
        several = engine.submit(list(range(1, 71)), params)
        run(engine)
        assert [sequence.cached for sequence in several] == [found] * 4
        assert {sequence.times.started for sequence in several} == {several[0].times.started}
    assert engine.stats().total.cached_tokens == 4 * 64 and engine.stats().total.prompt_tokens == 8 * 70


def test_n_texts_have_places_before_they_start(weights):
    engine = make_engine(weights, max_num_seqs=3)
    for _ in range(3):
        engine.submit(PROMPT, SamplingParams(n=2, max_tokens=20, **GREEDY))
    while engine.busy:
        engine.step()
        assert engine.stats().running <= 3


def test_of_n_texts_a_cancelled_one_stays_empty(weights):
    engine = make_engine(weights)
    first, second, third = engine.submit(PROMPT, SamplingParams(n=3, max_tokens=4, **GREEDY))
    engine.cancel(second)
    run(engine)
    assert (first.generated, second.generated, third.generated) == (4, 0, 4)


@pytest.mark.parametrize("pages", [3, 4])
def test_n_texts_with_hardly_any_pages(weights, pages):
    """With three there is room for one copy of the prompt's last page, and another one is wanted."""
    params = SamplingParams(n=3, seed=5, max_tokens=30, ignore_eos=True)
    plenty = make_engine(weights)
    expected = plenty.submit(PROMPT, params)
    run(plenty)
    engine = make_engine(weights, kv_cache_memory=pages * 2 * 2 * 2 * 32 * 16 * 4)
    found = engine.submit(PROMPT, params)
    run(engine)
    assert [s.tokens for s in found] == [s.tokens for s in expected] and engine.scheduler.preemptions > 0


def test_frequencies_follow_the_probabilities(weights):
    """2,000 draws of the first token against the softmax, by a chi-square bound."""
    engine = make_engine(weights, max_num_seqs=100)
    params = SamplingParams(n=100, max_tokens=1, top_k=5, logprobs=5, ignore_eos=True)
    counts, probabilities = Counter(), {}
    for seed in range(20):
        sequences = engine.submit(PROMPT, SamplingParams(**{**vars_of(params), "seed": 1000 * seed}))
        for outputs in run(engine, check=False).values():
            counts[outputs[0].token] += 1
            probabilities = {token: math.exp(logprob) for token, logprob in outputs[0].logprobs.top}
        assert len(sequences) == 100
    total = sum(probabilities.values())
    assert set(counts) <= set(probabilities)
    chi = sum((counts[t] - 2000 * p / total) ** 2 / (2000 * p / total) for t, p in probabilities.items())
    assert chi < 23.5, "four degrees of freedom: less than one in ten thousand"


def vars_of(params):
    return {name: getattr(params, name) for name in ("n", "max_tokens", "top_k", "logprobs", "ignore_eos")}


def test_biases_and_penalties(weights):
    banned = generated(text_of(weights, SamplingParams(max_tokens=1, **GREEDY)))[0]
    assert generated(text_of(weights, SamplingParams(max_tokens=1, logit_bias={banned: -100}, **GREEDY)))[0] != banned
    forced = generated(text_of(weights, SamplingParams(max_tokens=5, logit_bias={77: 100}, **GREEDY)))
    assert forced == [77] * 5
    assert (
        len(
            set(
                generated(
                    text_of(
                        weights, SamplingParams(max_tokens=30, frequency_penalty=2.0, presence_penalty=2.0, **GREEDY)
                    )
                )
            )
        )
        > 15
    )
    no_repeat = text_of(weights, SamplingParams(max_tokens=10, repetition_penalty=10.0, **GREEDY))
    assert generated(no_repeat) != generated(text_of(weights, SamplingParams(max_tokens=10, **GREEDY)))


def test_penalties_in_numbers():
    """Repetition: of tokens in prompt or text, away from what is likely; the others: of those in the text."""
    logits = np.array([1, -1, 2, -2, 3, 4], np.float32)
    params = SamplingParams(
        repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25, logit_bias={5: 1}, min_tokens=4
    )
    alter(logits, Draw(0, params, 0, 5, [0, 1], [2, 2, 3], (4,)))
    assert logits.tolist() == [0.5, -2.0, 1.0 - 1.25, -4.0 - 0.75, -np.inf, 5.0]


def test_warming_up_compiles_all_that_requests_may_need(weights):
    engine = make_engine(weights, max_num_seqs=1)
    engine.warm_up()
    assert engine.stats().steps == 0
    programs = set(engine.runner.team._compiled)
    for settings in ({}, GREEDY, {"min_tokens": 2}, {"logprobs": 2, "prompt_logprobs": 1}, {"presence_penalty": 0.5}):
        engine.submit([3, 4, 5], SamplingParams(max_tokens=3, **settings))
        run(engine)
    assert engine.runner.team._compiled == programs
    engine.close()


def test_logprobs_are_of_the_models_own_logits(weights):
    """Penalties change the choice, never the reported log-probabilities."""
    engine = make_engine(weights)
    plain, biased = (
        engine.submit(PROMPT, SamplingParams(max_tokens=1, logprobs=5, logit_bias=bias, **GREEDY))[0]
        for bias in (None, {77: 100})
    )
    outputs = run(engine)
    one, other = outputs[plain][0].logprobs, outputs[biased][0].logprobs
    assert (
        one.top == other.top and other.token == 77 and other.logprob < one.logprob and other.rank > 1 and one.rank == 1
    )


def test_many_prompt_logprobs_at_once(weights):
    """More rows with wanted logits than one step has room for: they wait for the next, and are the same."""
    rng = np.random.default_rng(5)
    prompts = [random_tokens(rng, 100) for _ in range(6)]
    params = SamplingParams(max_tokens=2, prompt_logprobs=2, logprobs=1, **GREEDY)
    engine = make_engine(weights, max_num_batched_tokens=512)
    together = [engine.submit(prompt, params)[0] for prompt in prompts]
    run(engine)
    for prompt, sequence in zip(prompts, together, strict=True):
        assert len(sequence.prompt_logprobs) == 99
        assert sequence.prompt_logprobs == text_of(weights, params, prompt).prompt_logprobs


def test_prompt_logprobs_of_a_prompt_in_pieces(weights):
    """Its rows come before those of a text with an adapter: both get what they get alone."""
    asking, params = SamplingParams(max_tokens=1, prompt_logprobs=2, **GREEDY), SamplingParams(max_tokens=9, **GREEDY)
    found = []
    for together in (False, True):
        engine = make_engine(weights, max_num_batched_tokens=24, num_scheduler_steps=1)
        use = AdapterUse(engine.add_adapter(make_adapter(weights.config)), 1.0)
        [text] = engine.submit(PROMPT[:5], params, (use,))
        while not (text.generated if together else text.finish_reason):
            engine.step()
        [asker] = engine.submit(PROMPT * 2, asking)
        run(engine)
        found.append((text.tokens, asker.prompt_logprobs))
    assert found[0] == found[1]


def test_prompt_logprobs_of_a_cached_prompt(weights):
    """The pages that are known hold no logits: all of it is computed again."""
    engine, params = make_engine(weights), SamplingParams(max_tokens=1, prompt_logprobs=2, **GREEDY)
    found = []
    for _ in range(2):
        [sequence] = engine.submit(PROMPT, params)
        run(engine)
        found.append(sequence.prompt_logprobs)
    assert found[0] == found[1] and len(found[0]) == len(PROMPT) - 1


def test_prompt_logprobs_of_a_preempted_prompt(weights):
    """What was found before it lost its pages stays; the rest comes when it is computed again."""
    rng = np.random.default_rng(6)
    prompts = [random_tokens(rng, 20) for _ in range(3)]
    params = SamplingParams(max_tokens=100, **GREEDY)
    asking, long = SamplingParams(max_tokens=2, prompt_logprobs=2, **GREEDY), random_tokens(rng, 200)
    engine = make_engine(weights, max_num_batched_tokens=12, kv_cache_memory=12 * 2 * 2 * 2 * 32 * 16 * 4)
    for prompt in prompts:
        engine.submit(prompt, params)
    [asker] = engine.submit(long, asking)
    run(engine)
    assert asker.preemptions > 0
    assert asker.prompt_logprobs == text_of(weights, asking, long).prompt_logprobs


# ---------------------------------------------------------------- sharing and cancelling


def test_prefix_cache_keys(weights):
    """Shared: equal tokens, adapters, scales and salt; anything else computes anew."""
    adapter = make_adapter(weights.config)
    engine = make_engine(weights)
    digest = engine.add_adapter(adapter)
    prompt = random_tokens(np.random.default_rng(1), 100)

    def cached(uses=(), salt=b"", tokens=prompt):
        [sequence] = engine.submit(tokens, SamplingParams(max_tokens=1, **GREEDY), uses, salt)
        run(engine)
        return sequence.cached

    use = (AdapterUse(digest, 1.0),)
    assert cached() == 0 and cached() == 96
    assert cached(use) == 0 and cached(use) == 96
    assert cached((AdapterUse(digest, 0.5),)) == 0
    assert cached(salt=b"x") == 0 and cached(salt=b"x") == 96
    forged = bytes.fromhex(digest.digest) + struct.pack("<d", 1.0)
    assert cached(salt=forged) == 0, "a salt stands for no adapter"
    assert cached(tokens=[prompt[0] + 1, *prompt[1:]]) == 0
    assert cached(tokens=prompt[:64]) == 32, "the last token is always computed"


def test_a_cached_prefix_goes_from_its_end(weights):
    """Its first pages are of use without its last ones, not the other way round."""
    engine = make_engine(weights, max_num_seqs=1, max_model_len=320)
    pages = engine.pool.pages
    prompt = random_tokens(np.random.default_rng(2), 32 * (pages - 2) + 1)

    def cached(tokens):
        [sequence] = engine.submit(tokens, SamplingParams(max_tokens=1, **GREEDY))
        run(engine)
        return sequence.cached

    assert cached(prompt) == 0 and cached(prompt) == 32 * (pages - 2)
    assert cached(random_tokens(np.random.default_rng(3), 32 * 3)) == 0, "one page more than is free"
    assert cached(prompt) == 32 * (pages - 3)


def test_without_prefix_cache(weights):
    engine = make_engine(weights, enable_prefix_caching=False)
    for _ in range(2):
        [sequence] = engine.submit([5] * 100, SamplingParams(max_tokens=1, **GREEDY))
        run(engine)
        assert sequence.cached == 0
    assert engine.pool.available == engine.pool.pages


def test_cancelling_at_any_moment_frees_everything(weights):
    adapter = make_adapter(weights.config)
    rng = np.random.default_rng(3)
    engine = make_engine(weights, max_num_batched_tokens=20)
    digest = engine.add_adapter(adapter)
    alone = generated(text_of(weights, SamplingParams(max_tokens=30, **GREEDY)))
    [needle] = engine.submit(PROMPT, SamplingParams(max_tokens=30, **GREEDY))
    others = []
    for step in range(200):
        if step % 3 == 0 and step < 60:
            others += engine.submit(
                random_tokens(rng, 50), SamplingParams(max_tokens=20, n=2, ignore_eos=True), (AdapterUse(digest, 1.0),)
            )
        if others and step % 2:
            engine.cancel(others.pop(int(rng.integers(len(others)))))
        engine.step()
        engine.scheduler.check_integrity()
    run(engine)
    assert generated(needle) == alone and engine.pool.held == 0
    assert engine.runner.adapter_pool.remove(digest.digest), "nobody uses the adapter any more"
    engine.cancel(needle)
    assert needle.finish_reason == "length", "cancelling what is done changes nothing"


def test_a_request_uses_so_many_adapters_and_no_more(weights):
    """The same one twice counts twice: it takes two places in the step."""
    engine = make_engine(weights)
    version = engine.add_adapter(make_adapter(weights.config, rank=4))
    whole = engine.submit(PROMPT, SamplingParams(max_tokens=3, **GREEDY), (AdapterUse(version, 1.0),))
    parts = engine.submit(PROMPT, SamplingParams(max_tokens=3, **GREEDY), (AdapterUse(version, 1 / 8),) * 8)
    run(engine)
    assert whole[0].tokens == parts[0].tokens
    with pytest.raises(UsageError, match="9 adapters in one request, at most 8 are possible\nUse fewer"):
        engine.submit(PROMPT, SamplingParams(), (AdapterUse(version, 1 / 9),) * 9)
    small = make_engine(weights, max_loras=2)
    different = [small.add_adapter(make_adapter(weights.config, seed=i)) for i in range(3)]
    with pytest.raises(UsageError, match="3 different adapters in one request, but max_loras is 2") as caught:
        small.submit(PROMPT, SamplingParams(), tuple(AdapterUse(version, 0.1) for version in different))
    assert caught.value.remedy == "Raise max_loras."
    small.submit(PROMPT, SamplingParams(max_tokens=1), (AdapterUse(different[0], 0.1),) * 3)
    run(small)


@pytest.mark.parametrize("act", ["cancel", "remove"])
def test_nothing_ends_within_a_step(weights, act):
    """A logits processor that cancels a text is told so; its own ends, and nobody else's is touched."""

    def meddle(prompt, text, logits):
        if act == "cancel":
            engine.cancel(other)
        engine.remove_adapter("a", force=True)

    engine = make_engine(weights)
    engine.add_adapter(make_adapter(weights.config), "a")
    [other] = engine.submit(PROMPT, SamplingParams(max_tokens=4, **GREEDY))
    [bad] = engine.submit(PROMPT, SamplingParams(max_tokens=4, logits_processors=[meddle], **GREEDY))
    run(engine)
    assert isinstance(bad.error, UsageError) and "logits processor" in str(bad.error)
    assert other.tokens == text_of(weights, SamplingParams(max_tokens=4, **GREEDY)).tokens
    engine.cancel(other)
    engine.remove_adapter("a", force=True)


def test_forced_removal_ends_requests_of_all_versions(weights):
    """And of those that use it beside others."""
    engine = make_engine(weights)
    first, sequences = AdapterUse(engine.add_adapter(make_adapter(weights.config, seed=9)), 1.0), []
    for seed in range(2):
        version = engine.add_adapter(make_adapter(weights.config, seed=seed), "x")
        sequences += engine.submit(PROMPT, SamplingParams(max_tokens=40, **GREEDY), (first, AdapterUse(version, 1.0)))
        engine.step()
    [other] = engine.submit(PROMPT, SamplingParams(max_tokens=4, **GREEDY))
    engine.remove_adapter("x", force=True)
    run(engine)
    assert all(isinstance(sequence.error, UnloadedError) for sequence in sequences) and other.finish_reason == "length"
    assert engine.runner.adapter_pool.in_use == 0


def test_more_adapters_than_slots(weights):
    engine = make_engine(weights, max_loras=2, max_num_seqs=6)
    digests = [engine.add_adapter(make_adapter(weights.config, rank=2, seed=seed)) for seed in range(5)]
    params = SamplingParams(max_tokens=6, **GREEDY)
    together = [engine.submit(PROMPT, params, (AdapterUse(d, 1.0),))[0] for d in digests]
    run(engine)
    for digest, sequence in zip(digests, together, strict=True):
        alone = make_engine(weights)
        for seed in range(5):
            alone.add_adapter(make_adapter(weights.config, rank=2, seed=seed))
        [expected] = alone.submit(PROMPT, params, (AdapterUse(digest, 1.0),))
        run(alone)
        assert sequence.tokens == expected.tokens


def test_high_ranks_are_refused_by_name(weights):
    engine = make_engine(weights, max_lora_rank=8)
    with pytest.raises(UsageError, match="max_lora_rank"):
        engine.add_adapter(make_adapter(weights.config, rank=9))


# ---------------------------------------------------------------- the machine


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """A function that writes files of control groups: path -> text; the process is in those that `own` tells."""
    monkeypatch.setattr(limits, "TREES", tmp_path / "trees")
    monkeypatch.setattr(limits, "OWN_GROUPS", tmp_path / "own")

    def write(own, files):
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            (tmp_path / "trees" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "trees" / name).write_text(f"{text}\n")

    return write


def test_limits_of_a_control_group_are_kept(groups):
    groups("0::/\n", {})
    count, before = limits.usable_cores(), memory.free_memory()
    groups("0::/\n", {"cpu.max": "max 100000", "memory.max": "max", "memory.current": "5"})
    assert limits.usable_cores() == count and memory.free_memory() > before // 2
    groups("0::/\n", {"cpu.max": "150000 100000", "memory.max": "1000000", "memory.current": "400000"})
    assert limits.usable_cores() == 1 and memory.free_memory() == 600000
    groups("0::/\n", {"memory.stat": "anon 100000\nfile 300000\ninactive_file 200000\nactive_file 50000"})
    assert memory.free_memory() == 850000, "files in memory give way"


def test_limits_of_version_1(groups):
    own = "5:cpuacct,cpu:/job\n4:memory:/job\n1:name=systemd:/\n0::/\n"
    cpu, memory = "cpuacct,cpu/job/cpu.cfs", "memory/job/memory"
    groups(own, {f"{cpu}_quota_us": "-1", f"{cpu}_period_us": "100000"})
    count = limits.usable_cores()
    groups(own, {f"{cpu}_quota_us": "120000"})
    assert limits.usable_cores() == 1 <= count
    assert limits.memory_left() is None
    groups(own, {f"{memory}.limit_in_bytes": "9000", f"{memory}.usage_in_bytes": "4000"})
    assert limits.memory_left() == 5000
    groups(own, {f"{memory}.stat": "inactive_file 1\ntotal_inactive_file 600\ntotal_active_file 70"})
    assert limits.memory_left() == 5670
    groups(own, {f"{memory}.limit_in_bytes": "9223372036854771712"})
    assert limits.memory_left() is None, "that is how it says that there is no limit"


@pytest.mark.parametrize("path", ["/a/b", "/elsewhere/outside", "/../up"])
def test_what_limits_a_group_limits_those_below(groups, path):
    """The root counts too where the path is not there, as in containers that see their own group as the root."""
    groups(f"0::{path}\n", {"cpu.max": "100000 100000", "memory.max": "700", "memory.current": "100"})
    groups(f"0::{path}\n", {"a/memory.max": "500", "a/memory.current": "50", "a/b/memory.max": "max"})
    assert limits.usable_cores() == 1
    assert limits.memory_left() == (450 if path == "/a/b" else 600)
