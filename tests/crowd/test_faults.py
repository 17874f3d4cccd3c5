"""What fails ends its own request, and the engine stays usable."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from minilora.errors import RequestError
from minilora.params import SamplingParams
from minilora.sequence import State

from ..support import VOCABULARY, make_adapter
from .driver import PARAMS, PROMPT, SHORT, Driver, alone, with_adapters


def test_a_failing_logits_processor_ends_its_request_only(weights, needle, shelf):
    def fail(prompt, text, logits):
        if len(text) == 3:
            raise ZeroDivisionError("on purpose")

    driver = with_adapters(weights, shelf)
    sequence = driver.submit("n", scale=0.75)
    bad = driver.submit("a1", params=SamplingParams(max_tokens=9, ignore_eos=True, logits_processors=[fail]))
    driver.run()
    assert bad.finish_reason == "error" and isinstance(bad.error, ZeroDivisionError) and bad.generated == 3
    assert driver.trace(sequence) == needle
    driver.idle()


def test_logits_processors_see_and_change_what_they_should(weights):
    seen = []

    def force(prompt, text, logits):
        seen.append((list(prompt), list(text), logits.shape))
        logits[:] = -1
        logits[40 + len(text)] = 1

    def other(prompt, text, logits):
        changed = logits.copy()
        changed[99] = 5
        return changed

    driver = Driver(weights)
    one = driver.submit(params=SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, logits_processors=[force]))
    two = driver.submit(
        params=SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, logits_processors=[force, other])
    )
    driver.run()
    assert one.tokens[150:] == [40, 41, 42] and two.tokens[150:] == [99, 99]
    assert (PROMPT, [40, 41], (weights.config.vocab_size,)) in seen
    driver.idle()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logits_processor_that_leaves_no_number_is_told(weights, bad):
    def spoil(prompt, text, logits):
        logits[9] = bad

    driver = Driver(weights)
    one = driver.submit(params=replace(SHORT, logits_processors=[spoil]))
    driver.run()
    assert isinstance(one.error, RequestError) and f"the logit of token 9 is {bad}" in str(one.error)
    driver.idle()


def test_a_failing_step_ends_its_requests_and_leaves_a_usable_engine(weights, shelf, needle, monkeypatch):
    driver = with_adapters(weights, shelf, max_num_seqs=2)
    first, second, third = driver.submit(), driver.submit(), driver.submit("n", scale=0.75)
    while not (first.generated and second.generated):
        driver.step()
    broken = threading.Event()

    def fail(*_):
        broken.set()
        raise MemoryError("on purpose")

    with monkeypatch.context() as patch:
        patch.setattr(driver.engine.runner, "run", fail)
        driver.step()
    assert broken.is_set()
    for sequence in (first, second):
        assert isinstance(sequence.error, RequestError) and isinstance(sequence.error.__cause__, MemoryError)
        assert sequence.error.outputs == []
    driver.run()
    assert driver.trace(third) == needle
    driver.idle()


def test_a_failure_after_the_step_is_told_to_everybody(weights, monkeypatch):
    """Log-probabilities can't be had in the very step in which texts end: nobody waits for ever."""
    driver = Driver(weights)
    params = SamplingParams(max_tokens=3, logprobs=1, temperature=0, ignore_eos=True, n=2)
    sequences = driver.engine.submit(PROMPT, params) + driver.engine.submit(PROMPT[:20], SHORT)
    while sequences[0].generated != 2:
        driver.step()

    def fail(wanted):
        if wanted:
            raise MemoryError("on purpose")
        return []

    with monkeypatch.context() as patch:
        patch.setattr(driver.engine.runner.sampler, "look_up", fail)
        driver.step()
    for sequence in sequences:
        assert sequence.finish_reason == "error" and isinstance(sequence.error.__cause__, MemoryError)
        assert driver.outputs[sequence][-1] == (None, None), "its end is told"
    driver.idle()


def test_a_failure_once_copies_have_started_ends_them_too(weights, monkeypatch):
    driver = Driver(weights)
    sequences = driver.engine.submit(PROMPT, replace(SHORT, n=3, prompt_logprobs=1))
    look_up = driver.engine.runner.sampler.look_up

    def fail(wanted):
        if sequences[1].state is State.RUNNING:
            raise MemoryError("on purpose")
        return look_up(wanted)

    monkeypatch.setattr(driver.engine.runner.sampler, "look_up", fail)
    driver.run(sequences[0])
    assert all(sequence.finish_reason == "error" for sequence in sequences)
    assert all(isinstance(sequence.error.__cause__, MemoryError) for sequence in sequences)
    driver.idle()


def test_an_interrupt_in_a_step_loses_nothing(weights, shelf, needle, monkeypatch):
    driver = with_adapters(weights, shelf)
    sequence = driver.submit("n", scale=0.75)
    while not sequence.generated:
        driver.step()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(driver.engine.runner, "run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            driver.step()
    assert driver.run().trace(sequence) == needle
    driver.idle()


@pytest.mark.parametrize("choice", [{}, {"temperature": 0.0}, {"top_p": 1.0}, {"top_k": 20}])
def test_logits_that_are_no_numbers_are_an_error(weights, choice):
    """An adapter whose numbers overflow: its request fails with the cause and leaves no pages behind, the neighbour's
    answer is right."""
    huge = make_adapter(weights.config, rank=4, modules=("down_proj",))
    for a, b in huge.pairs.values():
        a *= 1e4
        b *= 1e4
    driver = Driver(weights)
    driver.engine.add_adapter(huge, "huge")
    bad = driver.submit("huge", scale=1e38, params=replace(PARAMS, **choice))
    good = driver.submit()
    driver.run()
    again = driver.submit("huge", scale=1e38, params=replace(PARAMS, **choice))
    driver.run()
    for one in (bad, again):
        assert one.finish_reason == "error" and "finite" in str(one.error) and not one.cached
    assert driver.trace(good) == alone(weights)
    driver.idle()


@pytest.mark.parametrize("token", [0, 7, VOCABULARY - 1])
@pytest.mark.parametrize("threads", [1, 3])
def test_one_logit_that_is_no_number_is_an_error(weights, token, threads):
    """Beside good ones, which a search for the largest would find: an adapter that has a NaN for one token since it was
    checked."""
    bad = make_adapter(weights.config, rank=2, modules=("lm_head",))
    [(_, b)] = bad.pairs.values()
    b[token] = np.nan
    driver = Driver(weights, lora_dtype="float32", threads=threads)
    driver.engine.add_adapter(bad, "bad")
    requests = [driver.submit("bad", params=replace(SHORT, temperature=t)) for t in (0.0, 0.8)]
    driver.run()
    assert all(one.finish_reason == "error" and "finite" in str(one.error) for one in requests)
    assert not any(one.generated for one in requests)
