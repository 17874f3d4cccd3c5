"""LLM in the caller's thread: streams and callbacks beside other calls, and calls where none can be."""

import gc
import threading
import weakref
from functools import partial

import numpy as np
import pytest

from minilora import LLM, LoRARequest, SamplingParams
from minilora.config import ModelConfig
from minilora.errors import RequestError, UsageError

from .support import BASE_CONFIG, LINEAR, save_adapter

SIZES = {"max_model_len": 512, "max_num_seqs": 6, "debug_checks": True, "threads": 1, "num_scheduler_steps": 1}


def greedy(count, **params):
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **params)


@pytest.fixture(scope="module")
def llm(tiny):
    llm = LLM(str(tiny("llama")), **SIZES)
    yield llm
    llm.engine.check_integrity()
    assert not llm.llm_engine.busy and llm.engine.pool.held == 0
    llm.close()


def tokens_of(llm, prompt, count):
    return llm.generate(prompt, greedy(count))[0].outputs[0].token_ids


# ---------------------------------------------------------------- streams


def told(deltas):
    return [token for delta in deltas for output in delta.outputs for token in output.token_ids]


@pytest.mark.parametrize("count", [3, 40])
def test_a_stream_beside_other_calls_is_whole(llm, count):
    """These work on its text too, or end it."""
    stream = llm.stream("hello", greedy(20))
    deltas = [next(stream)]
    llm.generate("another", greedy(count))
    deltas += stream
    assert told(deltas) == tokens_of(llm, "hello", 20) and [delta.finished for delta in deltas][-1]


def test_streams_in_turn(llm):
    streams = {prompt: llm.stream(prompt, greedy(12 + 5 * i)) for i, prompt in enumerate(["one", "two", "three"])}
    heard = {prompt: [] for prompt in streams}
    while streams:
        for prompt, stream in list(streams.items()):
            if (delta := next(stream, None)) is None:
                del streams[prompt]
            else:
                heard[prompt].append(delta)
    for i, (prompt, deltas) in enumerate(heard.items()):
        assert told(deltas) == tokens_of(llm, prompt, 12 + 5 * i) and deltas[-1].finished


# ---------------------------------------------------------------- callbacks


def test_the_last_call_is_made_once(llm):
    """Though a neighbour's callback generates, and the steps of that end both."""
    calls = []

    def call(name, request):
        calls.append((name, request.finished))
        if calls == [("a", False)]:
            llm.generate("inner", greedy(30))

    for name in "ab":
        llm.submit("hello", partial(call, name), greedy(5))
    llm.run()
    assert calls.count(("a", True)) == calls.count(("b", True)) == 1 and calls[-1][1]


def test_an_interrupted_step_is_told(llm, monkeypatch):
    """Ctrl-C while texts are made of a step's tokens comes after the callbacks of that step."""
    calls, take = [], llm.llm_engine._take

    def interrupted(*args):
        llm.engine._interrupts._came = True
        take(*args)

    monkeypatch.setattr(llm.llm_engine, "_take", interrupted)
    request = llm.submit("hello", lambda request: calls.append(request.finished), greedy(1))
    with pytest.raises(KeyboardInterrupt):
        llm.run()
    monkeypatch.undo()
    llm.run()
    assert calls == [True] and request.output.outputs[0].token_ids == tokens_of(llm, "hello", 1)


def test_a_cancelled_request_is_forgotten(llm):
    """One too whose prompt's log-probabilities would have been told."""
    request = llm.submit("hello", None, greedy(5, prompt_logprobs=1))
    llm.cancel(request)
    left = weakref.ref(request)
    del request
    gc.collect()
    assert left() is None


# ---------------------------------------------------------------- steps within steps


def meddling(act):
    """A logits processor that acts once, and changes nothing."""
    left = [act]

    def process(prompt, text, logits):
        if left:
            left.pop()()

    return greedy(8, logits_processors=[process])


@pytest.mark.parametrize("call", ["generate", "stream", "step"])
def test_no_step_within_a_step(llm, call):
    """It would compute in the same arrays: who tries gets an error, and the neighbour its own tokens."""
    act = {"generate": lambda: llm.generate("x"), "stream": lambda: next(llm.stream("x")), "step": llm.step}[call]
    expected = tokens_of(llm, "neighbour", 8)
    bad = llm.submit("hello", None, meddling(act))
    other = llm.submit("neighbour", None, greedy(8, logit_bias={5: 0.0}))
    llm.run()
    assert isinstance(bad.output.error, UsageError) and "in a step already" in str(bad.output.error)
    assert other.output.outputs[0].token_ids == expected


def test_a_request_within_a_step_waits_for_the_next(llm):
    later = []
    first = llm.submit("hello", None, meddling(lambda: later.append(llm.submit("later", None, greedy(4)))))
    llm.run()
    assert first.output.outputs[0].token_ids == tokens_of(llm, "hello", 8)
    assert later[0].output.outputs[0].token_ids == tokens_of(llm, "later", 4)


def test_other_threads_are_refused_during_a_step(llm):
    refused = []

    def attempt(act):
        try:
            act()
        except UsageError as error:
            refused.append(str(error))

    calls = [lambda: llm.generate("x"), lambda: llm.submit("x"), llm.step, lambda: llm.cancel(waits)]

    def from_another_thread():
        for call in calls:
            thread = threading.Thread(target=attempt, args=(call,))
            thread.start()
            thread.join()

    waits = llm.submit("waits", None, greedy(4))
    request = llm.submit("hello", None, meddling(from_another_thread))
    llm.run()
    assert len(refused) == len(calls) and all("another thread" in text for text in refused)
    assert request.output.outputs[0].token_ids == tokens_of(llm, "hello", 8)
    assert waits.output.outputs[0].token_ids == tokens_of(llm, "waits", 4)


# ---------------------------------------------------------------- what is refused, and how


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_processor_that_leaves_no_number_is_named(llm, value, temperature):
    def spoil(prompt, text, logits):
        logits[11] = value

    params = SamplingParams(temperature=temperature, max_tokens=4, logits_processors=[spoil])
    with pytest.raises(RequestError, match=f"processors the logit of token 11 is {value}"):
        llm.generate("hello", params)


def test_parameters_must_be_some(llm):
    with pytest.raises(UsageError, match="0 sampling_params for 2 prompts"):
        llm.generate(["a", "b"], [])
    for call in (llm.generate, llm.submit):
        with pytest.raises(UsageError, match="sampling_params is") as caught:
            call("a", sampling_params={"temperature": 0})
        assert caught.value.param == "sampling_params"


def test_prompt_logprobs_are_made_step_by_step(llm):
    """So that those of a long prompt hold up nobody at its end; they are shown when the text begins."""
    request = llm.submit({"prompt_token_ids": [7] * 300}, None, greedy(1, prompt_logprobs=2))
    known = []
    while not request.finished:
        llm.step()
        known.append(len(request.prompt_logprobs))
        assert (request.output.prompt_logprobs is None) == (not request.finished)
    assert len(known) > 2 and known == sorted(set(known)) and known[-1] == 300
    assert request.output.prompt_logprobs[0] is None and all(7 in found for found in request.output.prompt_logprobs[1:])


def test_a_relative_path_stays_where_it_was(llm, tmp_path, monkeypatch):
    """An adapter is read when a request wants it, wherever the process is by then."""
    save_adapter(tmp_path / "mine", ModelConfig.from_dict(BASE_CONFIG), 4, LINEAR[:7])
    monkeypatch.chdir(tmp_path)
    llm.add_lora("mine", "./mine", load=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert llm.generate("hello", greedy(2), LoRARequest("mine"))[0].outputs[0].token_ids
    llm.remove_lora("mine")
