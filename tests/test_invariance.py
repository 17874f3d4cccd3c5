"""A request gives bitwise the same numbers whoever is beside it, however its prompt is cut, on any number of threads."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minilora.params import SamplingParams
from minilora.sequence import AdapterUse
from minilora_kernels.attention import partial_size
from minilora_kernels.cases import CASES
from minilora_kernels.formats import GROUPS
from minilora_kernels.pages import NOBODY

from .support import EVERYTHING, GREEDY, load_weights, make_adapter, make_engine, random_tokens, run

PROMPT = random_tokens(np.random.default_rng(7), 300)
RANKS = (2, 8, 16, 24)


def linear_cases():
    """(case, group), 0 of floating-point weights."""
    for case in CASES:
        if case.name.startswith("linear"):
            yield from ((case, group) for group in (GROUPS if "group" in case.small[0] else (0,)))


@pytest.mark.parametrize("case, group", list(linear_cases()), ids=lambda value: getattr(value, "name", value))
def test_linear_rows_do_not_depend_on_their_number(case, group):
    size = {**case.small[0], "M": 41, "K": 256, "group": group, "add": 0}
    weights, table, matrix, rows, row, count, first, end, out, at, stride, *rest = case.make(
        np.random.default_rng(1), size
    )
    together = np.zeros_like(out)
    case.compiled(weights, table, matrix, rows, row, count, first, end, together, at, stride, *rest)
    for start, length in [(0, 1), (40, 1), (3, 2), (5, 4), (2, 8), (1, 13), (6, 20), (2, 36)]:
        alone = np.zeros_like(out)
        case.compiled(weights, table, matrix, rows, start, length, first, end, alone, at, stride, *rest)
        assert np.array_equal(alone[: length * stride], together[start * stride : (start + length) * stride])


def by_name(name):
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name.startswith("attend ")], ids=lambda case: case.name
)
@pytest.mark.parametrize("window", [0, 290])
def test_attention_rows_do_not_depend_on_their_tile(case, window):
    size = {"position": 505, "tokens": 12, "heads": 1, "group": 3, "size": 64, "window": window}
    kv, query, pages, nobody, q, _, stride, out, _, _, scratch, _ = case.make(np.random.default_rng(2), size)
    case.compiled(kv, query, pages, nobody, q, 0, stride, out, 0, stride, scratch, 0)
    for start, count in [(0, 1), (11, 1), (2, 5), (6, 6)]:
        part = query._replace(position=query.position + start, tokens=count)
        alone = np.zeros_like(out)
        # Nor on what is asked for meanwhile.
        case.compiled(kv, part, pages, query, q, start * stride, stride, alone, 0, stride, scratch, 0)
        assert np.array_equal(alone[: count * stride], out[start * stride : (start + count) * stride])


@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
@pytest.mark.parametrize("window", [0, 290])
@pytest.mark.parametrize(("unit", "group", "size"), [("", 5, 80), (", 64 columns at a time", 13, 64)])
def test_attention_does_not_depend_on_who_does_which_part(kind, window, unit, group, size):
    """One token's splits, shared out in several ways and merged, as `attend` has them head by head."""
    attend, part, merge = (
        by_name(name) for name in (f"attend {kind}{unit}", f"attend_part {kind}{unit}", "merge_parts")
    )
    sizes = {
        "position": 1100,
        "heads": 3,
        "group": group,
        "size": size,
        "page": 64,
        "window": window,
        "low": 0,
        "high": 0,
    }
    kv, query, pages, heads, _, _, q, _, parts, _, scratch, _ = part.make(np.random.default_rng(3), sizes)
    row, splits, split0 = group * size, 5, 3 if window else 0
    expected, out = np.zeros_like(q), np.zeros_like(q)
    for head in range(heads):
        mine = query._replace(head=head)
        attend.compiled(kv, mine, pages, NOBODY, q, head * row, 0, expected, head * row, 0, scratch, 0)
    first, last = heads * split0, heads * splits
    for cuts in ([first, last], [first, first + 1, last - 2, last], range(first, last + 1)):
        parts[:] = np.nan
        for low, high in pairwise(cuts):
            part.compiled(kv, query, pages, heads, low, high, q, 0, parts, 0, scratch, 0)
        for r in range(heads * group):
            at = (r // group * splits + split0) * group * partial_size(size)
            merge.compiled(parts, at, splits - split0, group, r % group, size, out, r * size)
        assert np.array_equal(out, expected) and np.isfinite(out).all()


def trace(engine, sequence, outputs):
    """All numbers of a request: tokens, and log-probabilities of prompt and text."""
    return sequence.tokens, sequence.prompt_logprobs, [output.logprobs for output in outputs[sequence]]


PARAMS = SamplingParams(max_tokens=12, seed=3, temperature=0.8, top_p=0.9, logprobs=3, ignore_eos=True)


@pytest.fixture(
    scope="module",
    params=[
        ("llama-bias", "float32"),
        ("llama-odd-heads", "float16"),
        ("llama", "int4"),
        ("llama", "int8"),
        ("llama-large", "int8"),
        ("llama-bias", "bfloat16+inputs"),
    ],
    ids=["float32", "float16", "int4", "int8", "large", "rounded"],
)
def world(request, tiny):
    """(weights, adapters, the needle's trace alone), the needle with two adapters; they are int8 but beside float32."""
    name, dtype = request.param
    weights = load_weights(tiny(name), dtype)
    adapters = [make_adapter(weights.config, rank, EVERYTHING, seed=rank) for rank in RANKS]
    engine = make_engine(weights)
    digests = [engine.add_adapter(adapter) for adapter in adapters]
    needle = (AdapterUse(digests[1], 1.0), AdapterUse(digests[2], 0.5))
    [sequence] = engine.submit(PROMPT, PARAMS, needle)
    return weights, adapters, needle, trace(engine, sequence, run(engine))


def same_in(world, neighbours=0, seed=0, **config):
    weights, adapters, needle, alone = world
    engine = make_engine(weights, **{"max_num_seqs": 16, **config})
    digests = [engine.add_adapter(adapter) for adapter in adapters]
    rng = np.random.default_rng(seed)
    for i in range(neighbours):
        if i == neighbours // 2:
            [sequence] = engine.submit(PROMPT, PARAMS, needle)
        uses = tuple(AdapterUse(digests[j], float(rng.random())) for j in rng.permutation(4)[: rng.integers(0, 3)])
        params = SamplingParams(
            max_tokens=int(rng.integers(1, 20)),
            temperature=float(rng.choice([0, 1])),
            ignore_eos=True,
            n=int(rng.integers(1, 3)),
        )
        engine.submit(random_tokens(rng, int(rng.integers(1, 90))), params, uses)
    if not neighbours:
        [sequence] = engine.submit(PROMPT, PARAMS, needle)
    outputs = run(engine)
    assert trace(engine, sequence, outputs) == alone
    return engine, sequence


def test_among_neighbours(world):
    same_in(world, neighbours=15, seed=1)


@pytest.mark.parametrize("budget", [1, 7, 64])
def test_however_the_prompt_is_cut(world, budget):
    same_in(world, max_num_batched_tokens=budget)


@pytest.mark.parametrize("threads", [2, 4])
def test_on_any_number_of_threads(world, threads):
    same_in(world, threads=threads)
    same_in(world, threads=threads, neighbours=6, seed=2, max_num_batched_tokens=100)


def test_a_long_prompt_in_one_step(tiny):
    """So many rows that threads help each other with their norms, too."""
    weights, prompt = load_weights(tiny("llama-large"), "int8"), random_tokens(np.random.default_rng(8), 1300)
    found = []
    for threads, budget, steps in ((1, 64, 21), (2, 1300, 1)):
        sizes = {"max_num_batched_tokens": budget, "max_step_ms": None, "max_model_len": 1400}
        engine = make_engine(weights, threads=threads, num_scheduler_steps=1, **sizes)
        # Log-probabilities of the prompt would have it cut.
        [sequence] = engine.submit(prompt, SamplingParams(max_tokens=9, logprobs=3, **GREEDY))
        found.append(trace(engine, sequence, run(engine)))
        assert engine.stats().steps == steps + 8
    assert found[0] == found[1]


def test_after_preemption(world):
    weights = world[0]
    engine = make_engine(weights)
    page = (
        engine.runner.kv.heads
        * engine.runner.kv.page
        * engine.runner.kv.size
        * weights.config.layers
        * 2
        * engine.runner.kv.numbers.itemsize
    )
    # Whatever the machine's speed: in the same steps.
    steps = {"max_step_ms": None, "num_scheduler_steps": 1}
    engine, _ = same_in(world, neighbours=12, seed=3, kv_cache_memory=14 * page, **steps)
    assert engine.scheduler.preemptions > 0


def test_with_a_prefix_hit(world):
    weights, adapters, needle, alone = world
    engine = make_engine(weights)
    for adapter in adapters:
        engine.add_adapter(adapter)
    for expected_hit in (0, 288):
        [sequence] = engine.submit(PROMPT, PARAMS, needle)
        outputs = run(engine)
        assert sequence.cached == expected_hit
        assert trace(engine, sequence, outputs) == alone


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_mix_gives_what_each_gives_alone(world, data):
    """Random requests together, then one by one."""
    weights, adapters, _, _ = world
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    requests = []
    for _ in range(data.draw(st.integers(2, 6))):
        count = data.draw(st.sampled_from([1, 2, 31, 32, 33, 70]))
        uses = tuple(
            (j, data.draw(st.sampled_from([1.0, 0.25])))
            for j in data.draw(st.lists(st.integers(0, 3), max_size=2, unique=True))
        )
        params = SamplingParams(
            max_tokens=data.draw(st.integers(1, 5)),
            seed=1,
            temperature=data.draw(st.sampled_from([0.0, 1.0])),
            ignore_eos=True,
        )
        requests.append((random_tokens(rng, count), params, uses))
    config = {
        "max_num_batched_tokens": data.draw(st.sampled_from([3, 16, 200])),
        "threads": data.draw(st.sampled_from([1, 2])),
        "num_scheduler_steps": data.draw(st.sampled_from([1, 3, 8])),
        "num_speculative_tokens": data.draw(st.sampled_from([0, 8])),
    }

    def tokens_of(groups):
        found = []
        for group in groups:
            engine = make_engine(weights, **config)
            digests = [engine.add_adapter(adapter) for adapter in adapters]
            sequences = [
                engine.submit(t, p, tuple(AdapterUse(digests[j], s) for j, s in uses))[0] for t, p, uses in group
            ]
            run(engine)
            engine.close()
            found += [sequence.tokens for sequence in sequences]
        return found

    assert tokens_of([requests]) == tokens_of([[request] for request in requests])


def test_the_test_can_fail(world):
    """Another seed gives another text: the comparison above sees differences."""
    weights, adapters, needle, alone = world
    engine = make_engine(weights)
    for adapter in adapters:
        engine.add_adapter(adapter)
    [sequence] = engine.submit(
        PROMPT, SamplingParams(max_tokens=12, seed=4, temperature=0.8, logprobs=3, ignore_eos=True), needle
    )
    assert trace(engine, sequence, run(engine)) != alone


def test_greedy_decode_equals_prefill(world):
    """Feeding a generated text back as a prompt gives the same log-probabilities, bit for bit."""
    weights = world[0]
    engine = make_engine(weights)
    [first] = engine.submit(PROMPT, SamplingParams(max_tokens=20, logprobs=1, **GREEDY))
    generated = [output.logprobs for output in run(engine)[first]]
    engine = make_engine(weights)
    [again] = engine.submit(first.tokens, SamplingParams(max_tokens=1, prompt_logprobs=1, **GREEDY))
    run(engine)
    assert again.prompt_logprobs[len(PROMPT) - 1 :] == generated
