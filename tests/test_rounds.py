"""Several tokens in one step: the texts are what they are with one token at a time."""

from itertools import pairwise

import numpy as np
import pytest

from minilora.errors import RequestError
from minilora.model.attention import first_item
from minilora.params import SamplingParams
from minilora.sequence import AdapterUse, State
from minilora_kernels.jit import program
from minilora_kernels.pages import SPLIT

from .support import load_weights, make_adapter, make_engine, random_tokens

RNG = np.random.default_rng(8)
PROMPTS = [random_tokens(RNG, count) for count in (40, 7, 31, 64, 90, 12)]
EOS = tuple(range(0, 250, 9))
PARAMS = [
    SamplingParams(max_tokens=30, temperature=0, ignore_eos=True),
    SamplingParams(max_tokens=23, seed=1, stop_token_ids=tuple(range(1, 250, 20))),
    SamplingParams(max_tokens=40, seed=2, top_k=50, top_p=0.9),
    SamplingParams(max_tokens=5, seed=3, temperature=0.5, min_p=0.01, ignore_eos=True),
    SamplingParams(max_tokens=1, temperature=0),
    SamplingParams(max_tokens=33, seed=4, n=2, ignore_eos=True),
]


@pytest.fixture(scope="module")
def weights(tiny):
    return load_weights(tiny("llama"), "int4")


class Texts:
    """An engine whose steps may give every text `rounds` tokens, and what its steps gave."""

    def __init__(self, weights, rounds, eos=EOS, **config):
        # No drafts: where they pay, which is a matter of time, they take the place of rounds.
        config |= {"eos": eos, "debug_checks": True, "num_scheduler_steps": rounds, "num_speculative_tokens": 0}
        self.engine = make_engine(weights, **config)
        # As on a machine that is fast enough for all of them.
        self.engine._pace.rounds = lambda: rounds
        self.use = AdapterUse(self.engine.add_adapter(make_adapter(weights.config, rank=4)), 0.5)
        self.sequences, self.bursts = [], []

    def submit(self, prompt, params, adapted=False):
        self.sequences += self.engine.submit(prompt, params, (self.use,) if adapted else ())
        return self.sequences[-1]

    def step(self):
        outputs = self.engine.step()
        self.bursts.append(len(outputs))
        return outputs

    def run(self):
        while self.engine.busy:
            self.step()
        assert self.engine.pool.held == 0
        self.engine.close()
        return [(sequence.tokens, sequence.finish_reason, sequence.stop_token) for sequence in self.sequences]


def watch(monkeypatch, texts, change=lambda found: None):
    """(last position, rounds asked for, rounds done) of the steps to come; change: what to do with what they give."""
    whole, seen = texts.engine.runner.run, []

    def run(chunks, draws, rounds, ends):
        found = whole(chunks, draws, rounds, ends)
        last = max(chunk.start + chunk.length for chunk in chunks) - 1
        seen.append((last + rounds - 1, rounds, len(found)))
        change(found)
        return found

    monkeypatch.setattr(texts.engine.runner, "run", run)
    return seen


def all_texts(weights, rounds, **config):
    texts = Texts(weights, rounds, **config)
    for i, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
        texts.submit(prompt, params, adapted=i % 2 == 0)
    return texts.run(), texts.bursts


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("rounds", [2, 3, 8, 50])
def test_the_same_texts_in_fewer_steps(weights, rounds, threads):
    one_by_one, many = all_texts(weights, 1)
    found, fewer = all_texts(weights, rounds, threads=threads)
    assert found == one_by_one
    assert len(fewer) < len(many) * (0.8 if rounds == 2 else 0.6)


@pytest.mark.parametrize("kind", ["auto", "int8"])
def test_a_long_text_grows_over_splits(weights, kind):
    """Past position 256 its positions are shared out over the threads, from a round in the middle of a step on."""
    prompt, params = random_tokens(RNG, 250), SamplingParams(max_tokens=300, temperature=0, ignore_eos=True)
    found = []
    for rounds in (1, 7):
        texts = Texts(weights, rounds, threads=4, kv_cache_dtype=kind)
        texts.submit(prompt, params)
        found.append(texts.run())
    assert found[0] == found[1] and found[0][0][1] == "length" and len(texts.bursts) <= 45


@pytest.mark.parametrize("kind", ["auto", "int8"])
def test_a_long_text_in_a_window(tiny, kind):
    """Threads share the splits that the window still sees; others are not even looked at."""
    weights, prompt = load_weights(tiny("mistral"), "int4"), random_tokens(RNG, 500)
    found = []
    # Of two texts at once, each keeps one thread busy: their splits are not shared.
    for count, threads in ((2, 1), (1, 1), (1, 2), (1, 4)):
        texts = Texts(weights, 3, threads=threads, kv_cache_dtype=kind)
        for _ in range(count):
            texts.submit(prompt, SamplingParams(max_tokens=60, temperature=0, ignore_eos=True))
        found += texts.run()
    assert len(found) == 5 and all(text == found[0] for text in found) and found[0][1] == "length"


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 64])
@pytest.mark.parametrize(("first", "last"), [(0, 257), (0, 512), (0, 4129), (96, 300), (3840, 4937), (480, 512)])
def test_threads_share_a_long_text_by_positions(first, last, threads):
    begin, heads = program(first_item), 3

    def positions(items):
        splits = [item // heads for item in items]
        return sum(min(last, split * SPLIT + SPLIT) - max(first, split * SPLIT) for split in splits)

    cuts = [begin(first, last, heads, thread, threads) for thread in range(threads + 1)]
    parts = [range(*cut) for cut in pairwise(cuts)]
    assert cuts[0] == first // SPLIT * heads and cuts == sorted(cuts)
    assert sum(map(positions, parts)) == heads * (last - first)
    fair = heads * (last - first) / threads
    assert all(abs(positions(part) - fair) <= SPLIT for part in parts)


def test_pages_that_fill_up_in_a_burst_are_found_again(weights):
    texts = Texts(weights, 30)
    first = texts.submit(PROMPTS[0], PARAMS[0])
    while texts.engine.busy:
        texts.step()
    again = texts.submit(first.tokens, PARAMS[4])
    texts.run()
    assert len(first.tokens) == 70 and again.cached == 64


def test_rows_of_all_rounds_are_counted(weights):
    texts = Texts(weights, 30)
    texts.submit(PROMPTS[0], PARAMS[0])
    texts.run()
    assert texts.engine.stats().course.step_tokens.total == 40 + 29


def test_texts_that_come_meanwhile(weights):
    def texts_of(rounds):
        texts, rng = Texts(weights, rounds, max_num_seqs=3), np.random.default_rng(3)
        for i in range(14):
            texts.submit(PROMPTS[i % 6], PARAMS[(i * 5) % 6], adapted=i % 3 == 0)
            for _ in range(int(rng.integers(0, 5))):
                texts.step()
        return texts.run()

    assert texts_of(1) == texts_of(6)


@pytest.mark.parametrize("pages", [6, 7])
def test_nobody_loses_pages_for_it(weights, pages):
    """Seven pages are enough for both texts, with six one of them has to begin anew in any case."""
    page = 2 * 2 * 2 * 32 * 16 * 2
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    found = []
    for rounds in (1, 50):
        texts = Texts(weights, rounds, kv_cache_memory=pages * page)
        for prompt in PROMPTS[:2]:
            texts.submit(prompt, params)
        found.append(texts.run())
        assert texts.engine.stats().preemptions == 7 - pages
    assert found[0] == found[1]


def test_up_to_the_last_position(weights, monkeypatch):
    """Steps do not compute beyond what the model, and its tables, have room for."""
    params = SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)
    found = []
    for rounds in (1, 5):
        texts = Texts(weights, rounds, max_model_len=64)
        seen = watch(monkeypatch, texts)
        for prompt in PROMPTS[:3]:
            texts.submit(prompt, params)
        found.append(texts.run())
        assert max(last for last, _, _ in seen) < 64 and max(asked for _, asked, _ in seen) == rounds
    assert found[0] == found[1] and all(len(tokens) == 64 and end == "length" for tokens, end, _ in found[0])


@pytest.mark.parametrize("kind", ["eos", "stop_token_ids", "ignored"])
def test_nothing_is_computed_after_the_end(weights, monkeypatch, kind):
    alone = Texts(weights, 1)
    alone.submit(PROMPTS[0], PARAMS[0])
    text = alone.run()[0][0][len(PROMPTS[0]) :]
    length = next(i for i in range(3, 30) if text[i] not in text[:i]) + 1
    end = text[length - 1]
    texts = Texts(weights, 50, eos=() if kind == "stop_token_ids" else (end,))
    stops = (end,) if kind == "stop_token_ids" else ()
    texts.submit(
        PROMPTS[0], SamplingParams(max_tokens=30, temperature=0, ignore_eos=kind == "ignored", stop_token_ids=stops)
    )
    seen = watch(monkeypatch, texts)
    [(tokens, reason, _)] = texts.run()
    if kind == "ignored":
        assert seen == [(39, 1, 1), (68, 29, 29)] and tokens[40:] == text and reason == "length"
    else:
        assert seen == [(39, 1, 1), (68, 29, length - 1)] and tokens[40:] == text[:length] and reason == "stop"


def test_a_token_that_could_not_be_chosen_ends_one_text_only(weights, monkeypatch):
    """In the third of eight rounds: what came before is kept, what comes after is not, the neighbour goes on."""
    alone = Texts(weights, 1)
    alone.submit(PROMPTS[0], PARAMS[0])
    alone.submit(PROMPTS[1], PARAMS[0])
    (right, _, _), (other, _, _) = alone.run()
    texts = Texts(weights, 8)
    bad, good = (texts.submit(prompt, PARAMS[0]) for prompt in PROMPTS[:2])
    while not (bad.generated and good.generated):
        texts.step()
    before = len(bad.tokens)
    error = RequestError("no number")
    watch(monkeypatch, texts, lambda found: found[2].__setitem__(0, error) if bad.error is None else None)
    outputs = texts.step()
    assert bad.error is error and bad.finish_reason == "error" and bad.tokens == right[: before + 2]
    assert [output.token for output in outputs if output.sequence is bad] == [*right[before : before + 2], None]
    assert texts.run()[1] == (other, "length", None)


def test_a_place_that_is_waited_for_is_left_in_time(weights, monkeypatch):
    """Two texts run and have 4 and 30 tokens to go: 4 rounds while a third one waits, all of them otherwise."""
    for waiting, rounds in ((True, 4), (False, 30)):
        texts = Texts(weights, 50, max_num_seqs=2)
        seen = watch(monkeypatch, texts)
        for count in (5, 31):
            texts.submit(PROMPTS[1], SamplingParams(max_tokens=count, temperature=0, ignore_eos=True))
        texts.step()
        if waiting:
            texts.submit(PROMPTS[2], PARAMS[0])
        texts.step()
        assert seen[-1][1] == rounds
        texts.run()


def test_texts_whose_next_steps_are_not_known_get_one_token_a_step(weights):
    for extra in (
        {"logprobs": 0},
        {"min_tokens": 5},
        {"repetition_penalty": 1.1},
        {"logits_processors": [lambda *_: None]},
    ):
        texts = Texts(weights, 8)
        texts.submit(PROMPTS[0], SamplingParams(max_tokens=9, temperature=0, ignore_eos=True, **extra))
        texts.submit(PROMPTS[1], PARAMS[0])
        while not all(sequence.generated for sequence in texts.sequences):
            texts.step()
        assert len(texts.step()) == 2
        texts.run()


def test_copies_start_before_a_burst(weights):
    """Of a prompt of one token, or one beyond cached pages, only that is to be computed; yet its copies wait for it."""
    for prompt in (PROMPTS[0][:1], PROMPTS[0][:33]):
        found = []
        for rounds in (1, 8):
            texts = Texts(weights, rounds)
            for _ in range(2):
                texts.submit(prompt, SamplingParams(max_tokens=9, seed=5, n=3, ignore_eos=True))
                while texts.engine.busy:
                    texts.step()
            found.append(texts.run())
        assert found[0] == found[1] and len({tuple(tokens) for tokens, _, _ in found[0]}) == 3


def test_a_draft_comes_before_a_burst(weights):
    """Guesses are checked in a step of one round; afterwards bursts go on."""
    alone = Texts(weights, 1)
    alone.submit(PROMPTS[0], PARAMS[0])
    [(tokens, _, _)] = alone.run()
    texts = Texts(weights, 4)
    sequence = texts.submit(PROMPTS[0], PARAMS[0])
    while not sequence.generated:
        texts.step()
    texts.engine.propose(sequence, [*tokens[41:43], 3])
    assert [output.token for output in texts.step()] == tokens[41:44] and sequence.state is State.RUNNING
    assert [output.token for output in texts.step()] == tokens[44:48]
    assert texts.run()[0][0] == tokens
