"""Guesses from the text itself: found where they are, weighed, and without a trace in what comes out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minilora.lookup import SHARES, PromptLookup
from minilora.pace import FIRST_PRICE, MARGIN, Pace
from minilora.params import SamplingParams
from minilora.sequence import AdapterUse

from .support import load_weights, make_adapter, make_engine, random_tokens

# Numbers whose bytes, put together, hold each other at wrong places.
CONFUSING = st.sampled_from([0, 1, 256, 65536, 1 << 24, 257])


def naive(tokens, most):
    """What followed the latest earlier occurrence of the longest end that has one."""
    for count in SHARES:
        for start in range(len(tokens) - 1, count - 1, -1):
            if count < len(tokens) and tokens[start - count : start] == tokens[-count:]:
                grown = list(tokens)
                for i in range(most):
                    grown.append(grown[start + i])
                return grown[len(tokens) :]
    return []


@given(st.lists(CONFUSING, min_size=1, max_size=40), st.lists(CONFUSING, max_size=12), st.integers(1, 9))
def test_what_followed_before_is_expected_again(tokens, more, most):
    lookup = PromptLookup()
    for end in range(len(tokens), len(tokens) + len(more) + 1):
        text = (tokens + more)[:end]
        assert lookup.propose(text, most, 0) == naive(text, most)


def test_a_loop_goes_on():
    assert PromptLookup().propose([9, 1, 2, 3, 1, 2, 3, 1], 7, 0) == [2, 3, 1, 2, 3, 1, 2]


def test_as_many_as_pay():
    """Four tokens agree: each further draft is 0.8 times as likely as the one before."""
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    for price, count in ((0.0, 6), (0.5, 3), (0.63, 2), (0.65, 1), (0.81, 0)):
        assert PromptLookup().propose(text, 6, price) == [5, 6, 7, 8, 9, 0][:count]


@pytest.mark.parametrize("price", [0.3, 0.99], ids=["used", "not used"])
def test_a_text_that_goes_its_own_way_is_drafted_less(price):
    """Whether its drafts were checked or only compared with what came."""
    rng, lookup, text = np.random.default_rng(2), PromptLookup(), [1, 2, 3, 1, 2]
    assert PromptLookup().propose(text, 8, 0.3)
    for _ in range(20):
        lookup.propose(text, 8, price)
        text += [int(rng.integers(3, 1000)), 1, 2]
    assert not lookup.propose(text, 8, 0.3)


def test_a_text_that_repeats_itself_is_drafted_more():
    lookup, text = PromptLookup(), [1, 2, 3, 4, 5, 6]
    first = len(lookup.propose(text + text[:3], 64, 0.4))
    for _ in range(30):
        text += [1, 2, 3, 4, 5, 6]
        lookup.propose(text, 64, 0.4)
    assert len(lookup.propose(text + text[:3], 64, 0.4)) > 4 * first


def test_what_a_draft_costs_is_learned():
    pace = Pace(None, 512, 8)
    assert pace.draft_price(1) == FIRST_PRICE
    pace.observe(2, 0, 0.010)
    assert pace.draft_price(2) == FIRST_PRICE
    for _ in range(30):
        pace.observe(2, 0, 0.014, drafted=4)
    # A millisecond each, in which two texts get a fifth of a token.
    assert pace.draft_price(2) == pytest.approx(MARGIN * 0.2)
    assert pace.draft_price(1) == pytest.approx(MARGIN * 0.1)


def test_one_slow_step_does_not_end_drafts_for_good():
    pace = Pace(None, 512, 8)
    pace.observe(1, 0, 0.01)
    pace.observe(1, 0, 5.0, drafted=1)
    assert pace.draft_price(1) >= 1
    for _ in range(1000):
        pace.observe(1, 0, 0.01)
    assert pace.draft_price(1) < 1


def test_steps_with_prompts_say_nothing_of_drafts():
    pace = Pace(None, 512, 8)
    pace.observe(1, 0, 0.01)
    pace.observe(1, 100, 0.2, drafted=3)
    assert pace.draft_price(1) == FIRST_PRICE


# ---------------------------------------------------------------- in the engine

PAGE = 2 * 2 * 2 * 32 * 16 * 2
# A text that says one token again and again.
LOOP = {"temperature": 0, "logit_bias": {5: 100}, "ignore_eos": True}
RNG = np.random.default_rng(4)
LINE = random_tokens(RNG, 12)
PROMPTS = [LINE * 4, random_tokens(RNG, 40), LINE + random_tokens(RNG, 9) + LINE, LINE * 2, LINE * 3, LINE * 6, LINE]
PARAMS = [
    SamplingParams(max_tokens=60, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=60, temperature=0, stop_token_ids=tuple(range(0, 250, 40))),
    SamplingParams(max_tokens=40, temperature=0.3, seed=3, logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=40, temperature=0, repetition_penalty=1.02, min_tokens=20, logprobs=0),
    SamplingParams(max_tokens=33, temperature=0.2, seed=4, n=2, frequency_penalty=0.01, ignore_eos=True),
    SamplingParams(max_tokens=50, temperature=0, prompt_logprobs=1, logprobs=1, ignore_eos=True),
    SamplingParams(max_tokens=90, temperature=0, ignore_eos=True),
]


@pytest.fixture(scope="module")
def weights(tiny):
    return load_weights(tiny("llama"), "int4")


def free_drafts(weights, **config):
    """An engine on a machine where checking a draft costs nothing, and that is fast enough for all rounds."""
    config = {"num_scheduler_steps": 1, "debug_checks": True, **config}
    engine = make_engine(weights, **config)
    engine._pace.draft_price = lambda texts: 0.0
    engine._pace.rounds = lambda: config["num_scheduler_steps"]
    return engine


def texts(weights, drafts, params=PARAMS, **config):
    """(all that the texts are, the engine's counters)."""
    engine = free_drafts(weights, eos=[7], num_speculative_tokens=drafts, **config)
    use = AdapterUse(engine.add_adapter(make_adapter(weights.config, rank=4)), 0.5)
    sequences, outputs = [], {}
    for i, (prompt, one) in enumerate(zip(PROMPTS, params, strict=True)):
        sequences += engine.submit(prompt, one, (use,) if i % 2 else ())
    while engine.busy:
        for output in engine.step():
            outputs.setdefault(output.sequence, []).append((output.token, output.logprobs, output.last))
    stats = engine.stats()
    engine.close()
    assert engine.pool.held == 0
    return [(s.tokens, s.finish_reason, s.stop_token, s.prompt_logprobs, outputs[s]) for s in sequences], stats


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"threads": 2, "max_num_seqs": 3},
        {"kv_cache_dtype": "int8", "max_num_batched_tokens": 20},
        {"num_scheduler_steps": 8},
    ],
    ids=["one thread", "few places", "few rows", "rounds between"],
)
def test_the_texts_are_the_same(weights, config):
    plain, without = texts(weights, 0, **config)
    found, stats = texts(weights, 8, **config)
    assert found == plain
    assert without.drafts == without.draft_tokens == 0
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    assert stats.total.generated_tokens == without.total.generated_tokens


def test_a_text_that_repeats_itself_takes_few_steps(weights):
    engine = free_drafts(weights)
    [sequence] = engine.submit(LINE, SamplingParams(max_tokens=60, **LOOP))
    while engine.busy:
        engine.step()
    stats = engine.stats()
    engine.close()
    assert sequence.tokens[len(LINE) :] == [5] * 60
    # Two tokens until the first loop is seen, then nine a step.
    assert stats.steps <= 3 + 58 // 9 + 1 and stats.accepted_tokens == stats.draft_tokens == 60 - stats.steps


def test_a_sliding_window(tiny):
    weights, found = load_weights(tiny("mistral"), "int4"), []
    params = SamplingParams(max_tokens=150, temperature=0.5, seed=1, ignore_eos=True)
    for drafts in (0, 8):
        engine = free_drafts(weights, num_speculative_tokens=drafts)
        sequences = [engine.submit(LINE * count, params)[0] for count in (1, 4, 12)]
        while engine.busy:
            engine.step()
        found.append([sequence.tokens for sequence in sequences])
        assert (engine.stats().accepted_tokens > 0) == (drafts > 0)
        engine.close()
    assert found[0] == found[1]


def test_nobody_loses_pages_for_drafts(weights):
    engine = free_drafts(weights, num_speculative_tokens=0, kv_cache_memory=3 * PAGE)
    [longest] = engine.submit(random_tokens(RNG, 29), SamplingParams(max_tokens=6, **LOOP))
    others = [engine.submit(random_tokens(RNG, 20), SamplingParams(max_tokens=2, **LOOP))[0] for _ in range(2)]
    engine.step()
    engine.propose(longest, [5, 5, 5, 5])
    engine.step()
    # The drafts wanted a second page while each text had one of three.
    assert longest.generated == 2 and all(other.finish_reason == "length" for other in others)
    while engine.busy:
        engine.step()
    engine.close()
    assert engine.scheduler.preemptions == 0


def test_drafts_leave_rows_and_logits_to_others(weights):
    """A prompt whose log-probabilities are wanted goes on beside texts that could be drafted far ahead."""
    engine = free_drafts(weights, num_speculative_tokens=64, max_num_seqs=10, max_num_batched_tokens=64)
    loops = [engine.submit(LINE * 2, SamplingParams(max_tokens=400, **LOOP))[0] for _ in range(8)]
    while not all(sequence.generated > 10 for sequence in loops):
        engine.step()
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0, **LOOP)
    [prompt] = engine.submit(random_tokens(RNG, 60), asked)
    for _ in range(5):
        before = [sequence.generated for sequence in loops]
        engine.step()
        assert all(sequence.generated > count for sequence, count in zip(loops, before, strict=True))
    assert prompt.finish_reason == "length" and engine.stats().drafts > 0
    engine.close()


def test_pages_that_run_out(weights):
    """Texts that begin again are the same."""
    plain, _ = texts(weights, 0)
    found, stats = texts(weights, 64, kv_cache_memory=14 * PAGE, num_scheduler_steps=8)
    assert found == plain and stats.preemptions > 0 and stats.drafts > 0


def test_drafts_that_come_twice_are_dropped(weights):
    engine = free_drafts(weights)
    [sequence] = engine.submit(LINE, SamplingParams(max_tokens=20, **LOOP))
    engine.step()
    for draft in (6, 5):
        engine.propose(sequence, [draft] * 3)
    while engine.busy:
        engine.step()
    engine.close()
    assert sequence.tokens == LINE + [5] * 20


def test_drafts_count_for_penalties(weights):
    """Each is checked as if those before it were in the text."""
    choice = {"logit_bias": dict.fromkeys((5, 6, 7), 100), "frequency_penalty": 2.0}
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, **choice)
    texts = []
    for drafted in (False, True):
        engine = free_drafts(weights, num_speculative_tokens=0)
        [sequence] = engine.submit(LINE, params)
        engine.step()
        if drafted:
            engine.propose(sequence, texts[0][13:19])
        while engine.busy:
            engine.step()
        texts.append(sequence.tokens)
        assert engine.stats().accepted_tokens == 6 * drafted
        engine.close()
    assert texts[0] == texts[1] and set(texts[0][12:]) == {5, 6, 7}


def test_drafts_that_proved_wrong_leave_no_pages_behind(weights):
    engine = free_drafts(weights, num_speculative_tokens=0)
    [sequence] = engine.submit(LINE * 2, SamplingParams(max_tokens=20, **LOOP))
    engine.step()
    engine.propose(sequence, [6] * 8)
    engine.step()
    assert sequence.generated == 2 and engine.pool.held == 1
    engine.propose(sequence, [6] * 8)
    engine.cancel(sequence)
    assert sequence.tokens == [*LINE * 2, 5, 5]
    engine.close()


def test_logits_processors_see_the_text_only(weights):
    """Guesses would call them with what may not come."""
    seen = []
    watching = SamplingParams(
        max_tokens=40, temperature=0, ignore_eos=True, logits_processors=[lambda _, text, __: seen.append(list(text))]
    )
    found, stats = texts(weights, 8, [watching, *PARAMS[1:]], num_scheduler_steps=8)
    assert stats.drafts > 0
    assert seen == [found[0][0][len(PROMPTS[0]) :][:i] for i in range(40)]
