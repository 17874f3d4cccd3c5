"""The engine under load: the needle's answer stays bitwise the same, and what failed in other engines does not here.

L1 to L11 name failures that were reported of other servers.
"""

import json
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from safetensors.numpy import save_file

from minilora.adapters import load_adapter
from minilora.errors import AdapterError, MiniloraError, NotFoundError, RequestError
from minilora.params import SamplingParams
from minilora.sequence import AdapterUse, State

from .support import (
    LINEAR,
    VOCABULARY,
    load_weights,
    make_adapter,
    make_engine,
    peft_tensors,
    random_tokens,
    save_adapter,
)

RNG = np.random.default_rng(5)
PROMPT = random_tokens(RNG, 150)
PARAMS = SamplingParams(max_tokens=14, seed=3, temperature=0.8, top_p=0.95, logprobs=2, ignore_eos=True)
SHORT = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def weights(tiny):
    return load_weights(tiny("llama"), "int4")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, weights):
    """Folders of adapters of several ranks on all linear layers."""
    root = tmp_path_factory.mktemp("adapters")
    ranks = (4, 8, 33, 16, 1, 64, 5, 12)
    return [save_adapter(root / f"a{i}", weights.config, rank, LINEAR[:7], seed=i) for i, rank in enumerate(ranks)]


class Driver:
    """An engine, and what each of its sequences got."""

    def __init__(self, weights, **config):
        self.engine = make_engine(weights, **{"debug_checks": True, "max_lora_rank": 64, **config})
        self.outputs = {}

    def submit(self, name=None, prompt=PROMPT, params=PARAMS, scale=1.0, **order):
        names = () if name is None else (name,) if isinstance(name, str) else name
        uses = tuple(AdapterUse(self.engine.adapters.get(one), scale) for one in names)
        return self.engine.submit(prompt, params, uses, **order)[0]

    def step(self):
        for output in self.engine.step():
            self.outputs.setdefault(output.sequence, []).append((output.token, output.logprobs))
        self.engine.wait(10)

    def run(self, sequence=None):
        while self.engine.busy if sequence is None else sequence.state is not State.FINISHED:
            self.step()
        return self

    def trace(self, sequence):
        assert sequence.state is State.FINISHED and sequence.error is None
        return sequence.tokens, self.outputs[sequence]

    def idle(self):
        """Everything is given back."""
        self.run()
        assert self.engine.pool.held == 0 and self.engine.runner.adapters.in_use == 0
        self.engine.check_integrity()
        self.engine.close()


def alone(weights, *folders, prompt=PROMPT, params=PARAMS, scale=1.0):
    driver = Driver(weights)
    names = [driver.engine.add_adapter(folder, f"x{i}").name for i, folder in enumerate(folders)]
    sequence = driver.submit(names, prompt, params, scale)
    found = driver.run().trace(sequence)
    driver.idle()
    return found


@pytest.fixture(scope="module")
def needle(weights, shelf):
    """The needle's trace alone: adapter 2 at 0.75."""
    return alone(weights, shelf[2], scale=0.75)


def crowd(driver, count, seed):
    """Random neighbours with random adapters; the needle comes in their middle."""
    rng, found = np.random.default_rng(seed), None
    names = list(driver.engine.adapters.names)
    for i in range(count):
        if i == count // 2:
            found = driver.submit("n", scale=0.75)
        params = SamplingParams(
            max_tokens=int(rng.integers(1, 25)),
            temperature=float(rng.choice([0, 1])),
            ignore_eos=True,
            n=int(rng.integers(1, 3)),
        )
        name = names[int(rng.integers(len(names)))] if rng.random() < 0.8 else None
        prompt = (
            PROMPT[: int(rng.integers(1, 150))] if rng.random() < 0.3 else random_tokens(rng, int(rng.integers(1, 90)))
        )
        driver.submit(name, prompt, params, float(rng.random()))
    return found


def with_adapters(weights, shelf, ready=False, **config):
    """A driver that knows all adapters; ready: they are loaded, so that nothing depends on when that happens."""
    driver = Driver(weights, **config)
    for i, folder in enumerate(shelf):
        registry = driver.engine.adapters
        registry.add("n" if i == 2 else f"a{i}", folder, loaded=registry.read(folder) if ready else None)
    return driver


# ---------------------------------------------------------------- the needle


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_l1_l8_the_needle_among_31_others(weights, shelf, needle, threads):
    driver = with_adapters(weights, shelf, threads=threads, max_num_seqs=32)
    sequence = crowd(driver, 31, threads)
    assert driver.run().trace(sequence) == needle
    driver.idle()


@pytest.mark.parametrize("budget", [1, 7, 64, 512])
def test_l8_however_prompts_are_cut(weights, shelf, needle, budget):
    driver = with_adapters(weights, shelf, max_num_batched_tokens=budget, max_num_seqs=6)
    sequence = crowd(driver, 8, budget)
    assert driver.run().trace(sequence) == needle
    driver.idle()


def test_l9_preempted(weights, shelf, needle):
    """Hardly any pages: texts lose theirs and are computed again, seeds kept."""
    page = 2 * 2 * 2 * 32 * 16 * 2
    driver = with_adapters(weights, shelf, ready=True, max_num_seqs=12, kv_cache_memory=9 * page)
    sequence = crowd(driver, 12, 4)
    driver.run(sequence)
    assert driver.trace(sequence) == needle
    driver.run()
    assert driver.engine.stats().preemptions > 0
    driver.idle()


def test_l10_with_and_without_cached_prefixes(weights, shelf, needle):
    for caching in (True, False):
        driver = with_adapters(weights, shelf, enable_prefix_caching=caching)
        for expected in (0, 128 if caching else 0):
            sequence = driver.submit("n", scale=0.75)
            assert driver.run().trace(sequence) == needle
            assert sequence.cached == expected
        driver.idle()


def test_l11_a_seed_gives_one_text_at_any_place(weights, shelf, needle):
    driver = with_adapters(weights, shelf, max_num_seqs=8)
    sequences = [driver.submit("n", scale=0.75) for _ in range(20)]
    driver.run()
    assert all(driver.trace(sequence) == needle for sequence in sequences)
    driver.idle()


def test_guesses_change_nothing_but_the_number_of_steps(weights, shelf, needle):
    """Several tokens of a text are checked in one step; wrong guesses are rolled back, pages and all."""
    right = needle[0][len(PROMPT) :]
    rng = np.random.default_rng(1)
    for quality in (0.0, 0.7, 1.0):
        driver = with_adapters(weights, shelf)
        other = driver.submit("a1")
        sequence, steps = driver.submit("n", scale=0.75), 0
        while sequence.state is not State.FINISHED:
            done = sequence.generated
            steps += done > 0
            guesses = [t if rng.random() < quality else (t + 1) % 200 for t in right[done : done + 5]]
            driver.engine.propose(sequence, [*guesses, *([3] * 40)])
            driver.step()
        assert driver.trace(sequence) == needle
        assert (steps <= 3) == (quality == 1.0)
        driver.run()
        assert driver.trace(other) == alone(weights, shelf[1])
        driver.idle()


# ---------------------------------------------------------------- adapters come and go


def test_l2_adapters_are_loaded_around_a_running_text(weights, shelf, needle):
    driver = with_adapters(weights, shelf, max_loras=2, max_cpu_loras=2)
    sequence, others = driver.submit("n", scale=0.75), []
    for i in range(40):
        if i % 2 == 0:
            others.append(driver.submit(f"a{(0, 1, 3, 4, 5, 6, 7)[i % 7]}", PROMPT[:40], SHORT))
        driver.step()
    driver.run()
    assert driver.trace(sequence) == needle
    assert driver.engine.stats().adapters.evictions >= 5
    assert all(other.finish_reason == "length" for other in others)
    driver.idle()


def test_l3_replaced_under_the_same_name_and_path(weights, shelf, tmp_path):
    folder = shutil.copytree(shelf[0], tmp_path / "a")
    driver = Driver(weights)
    driver.engine.add_adapter(folder, "a")
    old = driver.submit("a")
    for _ in range(3):
        driver.step()
    shutil.copytree(shelf[1], folder, dirs_exist_ok=True)
    driver.engine.add_adapter(folder, "a")
    new = driver.submit("a")
    driver.run()
    assert driver.trace(old) == alone(weights, shelf[0]), "running requests finish on the old version"
    assert driver.trace(new) == alone(weights, shelf[1])
    assert new.cached == 0, "keys and values of the old version are not the new one's"
    driver.idle()


def test_l4_unloading_frees(weights, shelf):
    driver = Driver(weights)
    for cycle in range(300):
        name = f"a{cycle % 8}"
        driver.engine.add_adapter(shelf[cycle % 8], name)
        driver.submit(name, [5, 6, 7], SamplingParams(max_tokens=1))
        driver.run()
        driver.engine.remove_adapter(name)
        with pytest.raises(NotFoundError):
            driver.engine.adapters.get(name)
        assert driver.engine.stats().adapters.bytes == 0
    assert driver.engine.stats().by_adapter == {}
    driver.idle()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("moment", ["queue", "prefill", "decode"])
def test_l5_unloaded_while_in_use(weights, shelf, moment, force):
    driver = Driver(weights, max_num_seqs=1 if moment == "queue" else 4, max_num_batched_tokens=64)
    driver.engine.add_adapter(shelf[0], "a")
    bystander = driver.submit()
    used = driver.submit("a")
    enough = {"queue": lambda: True, "prefill": lambda: used.computed > 0, "decode": lambda: used.generated > 1}[moment]
    while not enough():
        driver.step()
    driver.engine.remove_adapter("a", force)
    driver.run()
    if force:
        assert used.finish_reason == "error" and isinstance(used.error, AdapterError)
    else:
        assert driver.trace(used) == alone(weights, shelf[0])
    assert driver.trace(bystander) == alone(weights)
    assert driver.engine.stats().adapters.bytes == 0
    driver.idle()


def test_l6_alternation_over_a_shared_prefix(weights, shelf):
    prompt = random_tokens(np.random.default_rng(2), 600)
    params = SamplingParams(max_tokens=4, logprobs=1, temperature=0, ignore_eos=True)
    expected = [alone(weights, shelf[i], prompt=prompt, params=params) for i in range(2)]
    driver = Driver(weights, max_num_batched_tokens=96, max_num_seqs=4)
    for i in range(2):
        driver.engine.add_adapter(shelf[i], f"a{i}")
    sequences = []
    for round_ in range(50):
        sequences.append((round_ % 2, driver.submit(f"a{round_ % 2}", prompt, params)))
        for _ in range(1 + round_ % 3):
            driver.step()
    driver.run()
    for which, sequence in sequences:
        assert driver.trace(sequence) == expected[which]
    assert driver.engine.stats().prefix_hits > 0
    driver.idle()


def test_l7_bad_adapters_beside_good_ones(weights, shelf, tmp_path, needle):
    """Fifty adapters that can't be loaded, each in its own way, while the needle runs."""
    driver = with_adapters(weights, shelf)
    sequence, bad = driver.submit("n", scale=0.75), []
    for i in range(50):
        folder = save_adapter(tmp_path / f"bad{i}", weights.config, 4, seed=i)
        tensors = peft_tensors(weights.config, 4, ("q_proj", "v_proj"), i)
        name = sorted(tensors)[i % len(tensors)]
        kind = i % 5
        if kind == 0:
            (folder / "adapter_model.safetensors").write_bytes(b"\xff" * (i + 1))
        elif kind == 1:
            tensors[name][0, 0] = np.nan
        elif kind == 2:
            del tensors[name]
        elif kind == 3:
            tensors[name] = tensors[name][:, :-1].copy()
        else:
            content = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps(content | {"use_dora": True}))
        if kind in (1, 2, 3):
            save_file(tensors, folder / "adapter_model.safetensors")
        try:
            driver.engine.add_adapter(folder, f"bad{i}")
        except MiniloraError:
            continue
        bad.append(driver.submit(f"bad{i}", PROMPT[:20], SHORT))
        driver.step()
    driver.run()
    assert driver.trace(sequence) == needle
    assert len(bad) >= 40 and all(s.finish_reason == "error" and isinstance(s.error, MiniloraError) for s in bad)
    driver.idle()


# ---------------------------------------------------------------- faults


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


@pytest.mark.parametrize("kind", ["int8", "float32"])
def test_other_page_formats_are_as_independent(weights, shelf, kind):
    def run(count):
        driver = with_adapters(weights, shelf, kv_cache_dtype=kind, max_num_seqs=6, max_num_batched_tokens=50)
        sequence = crowd(driver, count, 7) if count else driver.submit("n", scale=0.75)
        found = driver.run().trace(sequence)
        driver.idle()
        return found

    assert run(0) == run(10)


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
    """An adapter whose numbers overflow: its request fails with the cause, the neighbour's answer is right."""
    huge = make_adapter(weights.config, rank=4, modules=("down_proj",))
    for a, b in huge.pairs.values():
        a *= 1e4
        b *= 1e4
    driver = Driver(weights)
    driver.engine.add_adapter(huge, "huge")
    bad = driver.submit("huge", scale=1e38, params=replace(PARAMS, **choice))
    good = driver.submit()
    driver.run()
    assert bad.finish_reason == "error" and "finite" in str(bad.error)
    assert driver.trace(good) == alone(weights)
    driver.idle()


@pytest.mark.parametrize("token", [0, 7, VOCABULARY - 1])
@pytest.mark.parametrize("threads", [1, 3])
def test_one_logit_that_is_no_number_is_an_error(weights, token, threads):
    """Beside good ones, which a search for the largest would find: an adapter with a NaN for one token."""
    bad = make_adapter(weights.config, rank=2, modules=("lm_head",))
    [(_, b)] = bad.pairs.values()
    b[token] = np.nan
    driver = Driver(weights, lora_dtype="float32", threads=threads)
    driver.engine.add_adapter(bad, "bad")
    requests = [driver.submit("bad", params=replace(SHORT, temperature=t)) for t in (0.0, 0.8)]
    driver.run()
    assert all(one.finish_reason == "error" and "finite" in str(one.error) for one in requests)
    assert not any(one.generated for one in requests)


# ---------------------------------------------------------------- counters


def check_course(stats, before):
    """What the counters of a text's way through the engine must be after test_statistics_add_up's requests."""
    course, total = stats.course, stats.total
    assert course.texts.count == 13 and course.texts.total == 13 and course.max_tokens.total == 13 * 6
    assert course.prompt_tokens.total == 13 * 150 and course.generated_tokens.total == 72
    for times in (course.prefill_time, course.decode_time, course.inference_time, course.time_per_token):
        assert times.count == 12
    assert 12 <= course.queue_time.count <= 13 and course.preemptions.count == 13
    inference = course.prefill_time.total + course.decode_time.total
    assert course.inference_time.total == pytest.approx(inference)
    assert course.inference_time.total < total.latency.total
    assert course.decode_time.total == pytest.approx(total.inter_token_time.total)
    assert course.step_tokens.count == stats.steps == sum(times.count for times in stats.step_times.values())
    assert sum(times.total for times in stats.step_times.values()) == pytest.approx(stats.step_seconds)
    # Every row of a prompt that was not cached, and one for each token but the first of a text; the cancelled text's
    # rows may be among them.
    rows = total.prompt_tokens - total.cached_tokens + total.generated_tokens - 12
    assert rows <= course.step_tokens.total <= rows + 150
    assert {name: (load.running + load.waiting) for name, load in before.load_by_adapter.items()} == {"": 4, "n": 8}
    assert stats.load_by_adapter == {}
    assert stats.adapter_states["n"].state == "resident" and stats.adapter_states["n"].bytes > 0
    assert stats.by_adapter["n"].last_request >= before.by_adapter["n"].last_request
    copy = course.copy()
    course.step_tokens.add(1)
    assert copy.step_tokens.count == course.step_tokens.count - 1


def test_statistics_add_up(weights, shelf):
    driver = with_adapters(weights, shelf)
    for i in range(12):
        driver.submit("n" if i % 3 else None, params=SHORT)
    cancelled = driver.submit("a1", params=SHORT)
    driver.step()
    driver.engine.cancel(cancelled)
    before = driver.engine.stats()
    driver.run()
    stats = driver.engine.stats()
    total, by = stats.total, stats.by_adapter
    assert before.running + before.waiting == 12 and stats.running == stats.waiting == 0
    assert total.requests == 13 and total.finished == {"length": 12, "abort": 1}
    assert total.generated_tokens == 72 and total.prompt_tokens == 12 * 150
    assert by["n"].generated_tokens == 48 and by[""].generated_tokens == 24
    assert total.time_to_first_token.count == 12 and total.inter_token_time.count == 60
    assert total.latency.count == 13 and total.latency.total > total.time_to_first_token.total > 0
    assert stats.adapters.registered == 8 and stats.adapters.in_use == 0
    assert stats.pages_held == 0 and stats.pages_cached > 0 and stats.steps > 0
    check_course(stats, before)
    driver.engine.reset_prefix_cache()
    assert driver.engine.stats().pages_cached == 0
    driver.idle()


# ---------------------------------------------------------------- random operations on everything


# Places on the shelf: all but the largest adapter.
USED = (0, 1, 2, 3, 4, 6, 7)


class EngineMachine(RuleBasedStateMachine):
    """Requests, cancellations and adapters in any order; every answer that comes equals the one alone."""

    weights = shelf = room = None
    known: dict = {}

    def __init__(self):
        super().__init__()
        page = 2 * 2 * 2 * 32 * 16 * 2
        self.driver = Driver(
            self.weights,
            max_num_seqs=3,
            max_loras=4,
            max_cpu_loras=4,
            lora_memory=self.room,
            kv_cache_memory=9 * page,
            max_num_batched_tokens=48,
        )
        self.requests = []
        for i in range(4):
            self.driver.engine.add_adapter(self.shelf[i], f"a{i}")
        self.meaning = {f"a{i}": i for i in range(4)}

    @rule(
        names=st.lists(st.sampled_from(["a0", "a1", "a2", "a3"]), max_size=2, unique=True),
        length=st.sampled_from([1, 31, 33, 70, 150]),
    )
    def submit(self, names, length):
        sequence = self.driver.submit(names, PROMPT[:length], SHORT)
        self.requests.append((sequence, tuple(self.meaning[name] for name in names), length))

    @rule(count=st.integers(1, 5))
    def step(self, count):
        for _ in range(count):
            self.driver.step()

    @precondition(lambda self: self.requests)
    @rule(i=st.integers(0, 99))
    def cancel(self, i):
        sequence, *_ = self.requests.pop(i % len(self.requests))
        self.driver.engine.cancel(sequence)

    @rule(name=st.sampled_from(["a0", "a1", "a2", "a3"]), i=st.sampled_from(USED))
    def replace(self, name, i):
        self.driver.engine.add_adapter(self.shelf[i], name)
        self.meaning[name] = i

    @rule()
    def forget(self):
        self.driver.engine.reset_prefix_cache()

    @invariant()
    def books(self):
        self.driver.engine.check_integrity()

    def teardown(self):
        self.driver.run()
        for sequence, which, length in self.requests:
            if (which, length) not in self.known:
                folders = [self.shelf[i] for i in which]
                self.known[which, length] = alone(self.weights, *folders, prompt=PROMPT[:length], params=SHORT)
            assert self.driver.trace(sequence) == self.known[which, length]
        self.driver.idle()


def test_s25_batch_slot_hygiene_any_operations_in_any_order(weights, shelf):
    EngineMachine.weights, EngineMachine.shelf = weights, shelf
    registry = Driver(weights).engine.adapters
    # Room for any two of those that it uses, but not for three large ones.
    EngineMachine.room = sum(sorted(len(registry.read(shelf[i]).packed.data) for i in USED)[-2:])
    machine = EngineMachine.TestCase
    machine.settings = settings(
        max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
    )
    machine("runTest").runTest()


def test_loaded_from_disk_equals_given_as_arrays(weights, shelf, needle):
    driver = Driver(weights)
    driver.engine.add_adapter(load_adapter(shelf[2], weights.config), "n")
    sequence = driver.submit("n", scale=0.75)
    assert driver.run().trace(sequence) == needle
    driver.idle()
