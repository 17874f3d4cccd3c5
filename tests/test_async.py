"""AsyncEngine, and LLM's queue with callbacks: many coroutines, one engine, nobody in anybody's way."""

import asyncio
import gc
import math
import random
import signal
import threading
import time
import weakref
from pathlib import Path

import pytest

from minilora import LLM, AsyncEngine, LoRARequest, SamplingParams
from minilora.config import ModelConfig
from minilora.errors import (
    EngineClosedError,
    EngineDeadError,
    NotFoundError,
    QueueTimeoutError,
    RequestError,
    UsageError,
)

from .support import BASE_CONFIG, LINEAR, peft_tensors, save_adapter

CONFIG = ModelConfig.from_dict(BASE_CONFIG)
PROMPT = "The quick brown fox jumps over the lazy dog and then "
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
SIZES = {"max_model_len": 512, "max_num_seqs": 6, "debug_checks": True, "threads": 2, "dtype": "int8"}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return [str(save_adapter(root / f"a{i}", CONFIG, 4 + i, LINEAR[:7], seed=i)) for i in range(4)]


@pytest.fixture(scope="module")
def model(tiny):
    return str(tiny("llama"))


@pytest.fixture(scope="module")
def expected(model, shelf):
    """name -> text, from an LLM, one by one."""
    llm = LLM(model, lora={f"a{i}": path for i, path in enumerate(shelf)}, **SIZES)
    names = [None, *llm.adapters]
    found = {name: llm.generate(PROMPT, GREEDY, name and LoRARequest(name))[0].outputs[0].text for name in names}
    llm.close()
    assert len(set(found.values())) == 5
    return found


@pytest.fixture
def serve(model):
    """A function: runs a coroutine function with an AsyncEngine."""
    threads = set(threading.enumerate())

    def run(main, **config):
        engine = AsyncEngine(model, **{**SIZES, **config})

        async def guarded():
            await asyncio.wait_for(main(engine), 60)
            if engine.dead is None:
                stats = await engine.stats()
                await engine.check_integrity()
                assert (stats.running, stats.waiting, stats.pages_held, stats.adapters.in_use) == (0, 0, 0, 0)

        try:
            asyncio.run(guarded())
        finally:
            engine.close()

    yield run
    left = [t.name for t in threading.enumerate() if t not in threads and t.name.startswith("minilora")]
    assert not left, f"threads are left: {left}"


def test_many_at_once_equal_one_by_one(serve, shelf, expected):
    async def main(engine):
        for i, path in enumerate(shelf):
            await engine.add_lora(f"a{i}", path, load=i % 2 == 0)
        names = random.Random(1).choices(list(expected), k=40)
        assert {*names} == {*expected}
        answers = await asyncio.gather(*(engine.complete(PROMPT, GREEDY, name and LoRARequest(name)) for name in names))
        for name, answer in zip(names, answers, strict=True):
            assert answer.outputs[0].text == expected[name] and answer.outputs[0].finish_reason == "length"
            assert len(answer.outputs[0].token_ids) == 12

    serve(main)


def test_deltas_join_to_the_whole(serve):
    async def main(engine):
        params = SamplingParams(n=3, max_tokens=15, seed=1, logprobs=2, prompt_logprobs=1, ignore_eos=True, stop=["q"])
        whole = await engine.complete(PROMPT, params)
        texts, tokens, logprobs, first, last = ["", "", ""], [[], [], []], [[], [], []], None, None
        async for delta in engine.generate(PROMPT, params, request_id="mine"):
            assert not (last and last.finished), "nothing follows the end"
            for output in delta.outputs:
                texts[output.index] += output.text
                tokens[output.index] += output.token_ids
                logprobs[output.index] += output.logprobs
            first, last = first or delta, delta
        assert last.request_id == "mine"
        assert len(whole.prompt_logprobs) == len(PROMPT)
        assert first.prompt_logprobs == last.prompt_logprobs == whole.prompt_logprobs
        assert [o.text for o in whole.outputs] == texts and [o.token_ids for o in whole.outputs] == tokens
        assert [o.logprobs for o in whole.outputs] == logprobs
        for o in whole.outputs:
            likely = sum(found[token].logprob for found, token in zip(o.logprobs, o.token_ids, strict=True))
            assert o.cumulative_logprob == pytest.approx(likely)

    serve(main)


def test_what_was_cached_is_told(serve):
    async def main(engine):
        for cached in (0, 32):
            assert (await engine.complete(PROMPT, GREEDY)).num_cached_tokens == cached
        stream = engine.generate(PROMPT, GREEDY)
        assert (await anext(stream)).num_cached_tokens == 32
        await stream.aclose()

    serve(main)


def test_leaving_early_and_cancelling_free_everything(serve, expected):
    async def main(engine):
        endless = SamplingParams(max_tokens=400, ignore_eos=True)

        async def leave():
            stream = engine.generate(PROMPT, endless)
            async for _ in stream:
                break
            await stream.aclose()

        await asyncio.gather(*(leave() for _ in range(12)))
        tasks = [asyncio.create_task(engine.complete(PROMPT, endless)) for _ in range(12)]
        while not (await engine.stats()).running:
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        assert all(isinstance(x, asyncio.CancelledError) for x in await asyncio.gather(*tasks, return_exceptions=True))
        answer = await engine.complete(PROMPT, GREEDY)
        assert answer.outputs[0].text == expected[None]

    serve(main)


def test_cancelled_while_its_adapter_is_read_leaves_no_bytes(serve, shelf):
    async def main(engine):
        for i, path in enumerate(shelf):
            await engine.add_lora(f"a{i}", path, load=False)
        tasks = [asyncio.create_task(engine.complete(PROMPT, GREEDY, LoRARequest(f"a{i}"))) for i in range(4)]
        while not engine._llm.engine.adapters.loading:
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        registry = engine._llm.engine.adapters
        while registry.loading:
            await asyncio.sleep(0.001)
        assert all(version.packed is None for version in registry.names.values())

    serve(main)


def test_wrong_requests_are_told_at_once(serve):
    async def main(engine):
        for error, prompt, params, lora in (
            (UsageError, "", GREEDY, None),
            (UsageError, "x" * 600, GREEDY, None),
            (UsageError, PROMPT, SamplingParams(n=7), None),
            (UsageError, {"tokens": [1]}, GREEDY, None),
            (NotFoundError, PROMPT, GREEDY, LoRARequest("nobody")),
            (NotFoundError, PROMPT, GREEDY, LoRARequest("x", lora_path="/nowhere/at/all")),
        ):
            with pytest.raises(error):
                await engine.complete(prompt, params, lora)

    serve(main)


def _slowly(prompt, text, logits):
    """A logits processor that changes nothing, and gives what else happens 20 ms for every token."""
    time.sleep(0.02)
    return logits


def test_who_waits_too_long_is_told(serve, expected):
    async def main(engine):
        endless = SamplingParams(max_tokens=450, ignore_eos=True, logits_processors=[_slowly])
        busy = engine.generate(PROMPT, endless, start_within=0.5)
        await anext(busy)
        with pytest.raises(QueueTimeoutError, match=r"did not start within 0\.6 s\nRaise .*--queue-timeout"):
            await engine.complete(PROMPT, GREEDY, start_within=0.6)
        assert (await anext(busy)).outputs[0].token_ids, "one that has begun goes on"
        waiting = asyncio.create_task(engine.complete(PROMPT, GREEDY, start_within=30))
        await busy.aclose()
        assert (await waiting).outputs[0].text == expected[None]

    serve(main, max_num_seqs=1, num_scheduler_steps=1)


def test_who_has_begun_waits_for_nothing_though_its_first_text_has_ended(serve):
    """And of a text that has ended nothing more is told."""

    async def main(engine):
        whole = await engine.complete(PROMPT, SamplingParams(max_tokens=40, ignore_eos=True, n=2, seed=3))
        first, second = (output.token_ids for output in whole.outputs)
        stop = next(token for token in first[:8] if token not in second)
        params = SamplingParams(
            max_tokens=40, ignore_eos=True, n=2, seed=3, stop_token_ids=[stop], logits_processors=[_slowly]
        )
        heard = []
        async for output in engine.generate(PROMPT, params, start_within=0.5):
            heard += output.outputs
        ends = [(output.index, output.finish_reason) for output in heard if output.finish_reason]
        assert ends == [(0, "stop"), (1, "length")]
        assert [id_ for output in heard if output.index == 1 for id_ in output.token_ids] == second

    serve(main, num_scheduler_steps=1)


def test_warming_up_leaves_no_trace(serve):
    async def main(engine):
        await engine.warm_up()
        stats = await engine.stats()
        assert (stats.steps, stats.total.requests, stats.total.generated_tokens) == (0, 0, 0)
        answer = engine.generate(PROMPT, SamplingParams(max_tokens=450, ignore_eos=True))
        await anext(answer)
        with pytest.raises(UsageError, match="at work"):
            await engine.warm_up()
        await answer.aclose()

    serve(main)


def test_one_requests_error_is_nobody_elses(serve, expected):
    def fail(prompt, text, logits):
        raise ZeroDivisionError("on purpose")

    async def main(engine):
        bad = SamplingParams(max_tokens=5, logits_processors=[fail])
        found = await asyncio.gather(
            *(engine.complete(PROMPT, bad if i % 3 == 0 else GREEDY) for i in range(9)), return_exceptions=True
        )
        for i, answer in enumerate(found):
            if i % 3 == 0:
                assert isinstance(answer, RequestError) and isinstance(answer.__cause__, ZeroDivisionError)
            else:
                assert answer.outputs[0].text == expected[None]

    serve(main)


async def _comes(event):
    while not event.is_set():
        await asyncio.sleep(0.001)


def test_a_question_that_nobody_waits_for_any_more(serve, expected):
    async def main(engine):
        entered, go = threading.Event(), threading.Event()

        def hold(prompt, text, logits):
            entered.set()
            go.wait(30)

        held = asyncio.create_task(engine.complete(PROMPT, SamplingParams(max_tokens=2, logits_processors=[hold])))
        await _comes(entered)
        asking = asyncio.create_task(engine.stats())
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.sleep(0)
        go.set()
        await held
        assert (await engine.complete(PROMPT, GREEDY)).outputs[0].text == expected[None]

    serve(main)


def test_a_dead_engine_says_so(serve, monkeypatch):
    """To those whose texts it was at work on, to who asks it something just then, and to all who come later."""

    async def main(engine):
        endless = SamplingParams(max_tokens=400, ignore_eos=True)
        running = asyncio.create_task(engine.complete(PROMPT, endless))
        while not (await engine.stats()).running:
            await asyncio.sleep(0.001)
        entered, go = threading.Event(), threading.Event()

        def fail():
            entered.set()
            go.wait(30)
            raise AssertionError("a bug")

        monkeypatch.setattr(engine._llm.engine.scheduler, "schedule", fail)
        await _comes(entered)
        asking = asyncio.create_task(engine.stats())
        await asyncio.sleep(0)
        go.set()
        for told in (running, asking):
            with pytest.raises(EngineDeadError, match="a bug"):
                await told
        with pytest.raises(EngineDeadError, match="a bug"):
            await engine.complete(PROMPT, GREEDY)
        assert engine.dead is not None

    serve(main)


def test_closing_ends_what_runs(serve, shelf):
    async def main(engine):
        running = asyncio.create_task(engine.complete(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True)))
        while not (await engine.stats()).running:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineClosedError, match="closed"):
            await running
        with pytest.raises(EngineClosedError, match="closed"):
            await engine.add_lora("late", shelf[0])

    serve(main)


def test_adapters_come_and_go_under_load(serve, shelf, expected):
    """Users of four adapters, some of whom leave; adapters are replaced and removed meanwhile; answers stay right."""

    async def main(engine):
        rng = random.Random(3)
        for i, path in enumerate(shelf):
            await engine.add_lora(f"a{i}", path)

        async def user(number):
            for _ in range(8):
                name = rng.choice(list(expected))
                lora = name and LoRARequest(name)
                if rng.random() < 0.25:
                    stream = engine.generate(PROMPT, GREEDY, lora)
                    async for _ in stream:
                        break
                    await stream.aclose()
                    continue
                answer = await engine.complete(PROMPT, GREEDY, lora, tenant=str(number % 3), priority=number % 2)
                assert answer.outputs[0].text == expected[name]

        async def churn():
            for turn in range(30):
                i = turn % 4
                await engine.add_lora(f"a{i}", shelf[i], load=turn % 2 == 0)
                await engine.add_lora("other", shelf[(i + 1) % 4])
                await engine.remove_lora("other", force=turn % 2 == 0)
                await engine.reset_prefix_cache()

        await asyncio.gather(churn(), *(user(i) for i in range(10)))

    serve(main, max_loras=2, max_cpu_loras=2)


def test_two_event_loops_share_an_engine(model, expected):
    engine = AsyncEngine(model, **SIZES)
    texts = []

    def other():
        texts.append(asyncio.run(engine.complete(PROMPT, GREEDY)).outputs[0].text)

    threads = [threading.Thread(target=other) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    engine.close()
    assert texts == [expected[None]] * 3


def test_an_event_loop_that_is_closed_is_nobody_elses_trouble(model, expected):
    engine, loop = AsyncEngine(model, **SIZES), asyncio.new_event_loop()
    stream = engine.generate(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True))
    loop.run_until_complete(anext(stream))
    loop.close()
    assert asyncio.run(engine.complete(PROMPT, GREEDY)).outputs[0].text == expected[None]
    engine.close()


def test_weights_of_adapters_arrive(model, shelf):
    async def main():
        await engine.add_lora("a0", shelf[0], weight=2.0)

    engine, llm = AsyncEngine(model, **SIZES), LLM(model, **SIZES)
    asyncio.run(main())
    llm.add_lora("a0", shelf[0], weight=3.0)
    for one, weight in ((engine._llm, 2.0), (llm.llm_engine, 3.0)):
        assert one.engine.adapters.get("a0").weight == weight
    engine.close()
    llm.close()


# ---------------------------------------------------------------- LLM's queue


@pytest.fixture(scope="module")
def llm(model):
    llm = LLM(model, num_scheduler_steps=1, **SIZES)
    yield llm
    llm.close()


def test_a_queue_with_callbacks(llm, expected):
    calls = {}

    def callback(request):
        calls.setdefault(request.output.request_id, []).append(request.output.outputs[0].text)

    requests = [llm.submit(PROMPT, callback, GREEDY) for _ in range(9)]
    llm.step()
    assert sum(bool(r.output.outputs[0].token_ids) for r in requests) <= 6, "max_num_seqs run, the others wait"
    llm.run()
    for request in requests:
        texts = calls[request.output.request_id]
        assert len(texts) == 12 and texts[-1] == expected[None] == request.output.outputs[0].text
        assert request.finished


def test_one_token_a_step_for_everybody(llm):
    requests = [llm.submit(PROMPT[: 10 + i], None, GREEDY) for i in range(6)]
    while not all(request.output.outputs[0].token_ids for request in requests):
        llm.step()
    before = [len(request.output.outputs[0].token_ids) for request in requests]
    changed = llm.step()
    assert set(changed) == set(requests)
    assert [len(request.output.outputs[0].token_ids) for request in requests] == [count + 1 for count in before]
    llm.run()


def test_a_stop_string_in_the_middle_of_a_burst(model, expected):
    """Tokens that the engine computed beyond it are nobody's."""
    found, stop = [], expected[None][4:6]
    for rounds in (1, 8):
        llm = LLM(model, num_scheduler_steps=rounds, **SIZES)
        llm.llm_engine.engine._pace.rounds = lambda rounds=rounds: rounds
        [answer] = llm.generate(PROMPT, SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, stop=stop))
        found.append((answer.outputs[0].text, list(answer.outputs[0].token_ids), answer.outputs[0].stop_reason))
        llm.close()
    assert found[0] == found[1] and found[0][2] == stop and expected[None].startswith(found[0][0] + stop)


def test_callbacks_may_fail_submit_and_cancel(llm, expected):
    more = []

    def fail(request):
        raise ZeroDivisionError("on purpose")

    def go_on(request):
        if request.finished and not more:
            llm.cancel(endless)
            more.append(llm.submit(PROMPT, None, GREEDY))

    endless = llm.submit(PROMPT, None, SamplingParams(max_tokens=400, ignore_eos=True))
    bad, good = llm.submit(PROMPT, fail, GREEDY), llm.submit(PROMPT, go_on, GREEDY)
    llm.run()
    assert isinstance(bad.output.error, ZeroDivisionError) and bad.output.outputs[0].finish_reason == "error"
    assert endless.output.outputs[0].finish_reason == "abort"
    assert good.output.outputs[0].text == more[0].output.outputs[0].text == expected[None]


def test_generate_raises_with_all_outputs(llm, expected):
    def fail(prompt, text, logits):
        raise ZeroDivisionError("on purpose")

    params = [GREEDY, SamplingParams(logits_processors=[fail])]
    with pytest.raises(RequestError, match="1 of 2") as caught:
        llm.generate([PROMPT, PROMPT], params)
    assert caught.value.outputs[0].outputs[0].text == expected[None]
    assert isinstance(caught.value.outputs[1].error, ZeroDivisionError)


def test_adapters_as_arrays_replaced_in_place(llm, expected):
    for i in (0, 1):
        tensors = peft_tensors(CONFIG, 4 + i, LINEAR[:7], i)
        llm.add_lora("arrays", tensors, {"r": 4 + i, "lora_alpha": 2 * (4 + i)})
        assert llm.generate(PROMPT, GREEDY, LoRARequest("arrays"))[0].outputs[0].text == expected[f"a{i}"]
    with pytest.raises(UsageError, match="adapter_config"):
        llm.add_lora("arrays", tensors)
    llm.remove_lora("arrays")
    with pytest.raises(NotFoundError):
        llm.generate(PROMPT, GREEDY, LoRARequest("arrays"))


@pytest.mark.parametrize(
    "arguments, cause",
    [
        ([[[1, 2, 3]]], "a prompt must be"),
        ([{"prompt": 7}], "a prompt must be .*, not {'prompt': 7}"),
        ([{"prompt_token_ids": [512]}], "token id 512 is outside the vocabulary of"),
        ([{"prompt_token_ids": [5, True]}], "a prompt must be"),
        ([PROMPT, GREEDY, "a1"], "'a1', not a LoRARequest"),
        ([PROMPT, GREEDY, ["a1"]], "'a1', not a LoRARequest"),
        ([PROMPT, GREEDY, [LoRARequest("a1"), LoRARequest("a2")]], "2 entries of lora_request for 1 prompts"),
        ([[PROMPT, PROMPT], [GREEDY]], "1 sampling_params for 2 prompts"),
    ],
)
def test_wrong_arguments_are_named(llm, arguments, cause):
    with pytest.raises(UsageError, match=cause):
        llm.generate(*arguments)


def test_adapters_from_the_start(model, shelf, expected):
    async def main():
        return await engine.complete(PROMPT, GREEDY, LoRARequest("a2"))

    engine = AsyncEngine(model, lora={"a2": shelf[2]}, **SIZES)
    try:
        assert asyncio.run(main()).outputs[0].text == expected["a2"]
    finally:
        engine.close()
    before = threading.active_count()
    with pytest.raises(NotFoundError):
        LLM(model, lora={"a2": "/nowhere/at/all"}, **SIZES)
    assert threading.active_count() == before, "threads of an engine that nobody has"


def test_paths_may_be_path_objects(model, shelf, expected):
    llm = LLM(model, lora={"a1": Path(shelf[1])}, **SIZES)
    llm.add_lora("a2", Path(shelf[2]))
    for lora in (LoRARequest("a1"), LoRARequest("a2"), LoRARequest("a3", 1, Path(shelf[3]))):
        assert llm.generate(PROMPT, GREEDY, lora)[0].outputs[0].text == expected[lora.lora_name]
    llm.close()


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 1e39, "1", True])
def test_scales_that_are_no_scales_are_refused(llm, shelf, scale):
    with pytest.raises(UsageError, match="scale"):
        llm.generate(PROMPT, GREEDY, LoRARequest("a1", 0, shelf[1], scale))


def test_a_negative_scale_takes_away_what_an_adapter_adds(llm, shelf, expected):
    both = [LoRARequest("a1", 0, shelf[1], scale) for scale in (0.5, -0.5)]
    assert llm.generate([PROMPT], GREEDY, [both])[0].outputs[0].text == expected[None]


def test_what_comes_after_a_stop_string_counts_nowhere(model):
    """A step may have several tokens for a text, and its end: the text ended before."""
    llm = LLM(model, num_scheduler_steps=8, **SIZES)
    llm.generate(PROMPT, SamplingParams(max_tokens=60, temperature=0, ignore_eos=True))
    params = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    [whole] = llm.generate(PROMPT, SamplingParams(**params))[0].outputs
    before = llm.stats()
    [cut] = llm.generate(PROMPT, SamplingParams(stop=whole.text[2], **params))[0].outputs
    after = llm.stats()
    assert cut.finish_reason == "stop" and len(cut.token_ids) < 8
    assert after.total.finished - before.total.finished == {"stop": 1}
    assert after.total.generated_tokens - before.total.generated_tokens == len(cut.token_ids)
    assert after.course.generated_tokens.total - before.course.generated_tokens.total == len(cut.token_ids)
    llm.close()


@pytest.mark.parametrize("part, computed", [("schedule", 0), ("generated", 1)])
def test_ctrl_c_comes_between_the_lines_of_the_books(llm, expected, monkeypatch, part, computed):
    """What it interrupts is whole: the same engine goes on, and no token is lost."""
    real, steps = getattr(llm.engine.scheduler, part), llm.stats().steps

    def interrupted(*args):
        monkeypatch.setattr(llm.engine.scheduler, part, real)
        signal.raise_signal(signal.SIGINT)
        return real(*args)

    requests = [llm.submit(PROMPT, None, GREEDY) for _ in range(3)]
    monkeypatch.setattr(llm.engine.scheduler, part, interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.step()
    assert llm.stats().steps == steps + computed
    llm.engine.check_integrity()
    llm.run()
    assert [request.output.outputs[0].text for request in requests] == [expected[None]] * 3


def test_ctrl_c_ends_what_is_computed(llm, monkeypatch):
    def endless(*_):
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not interrupted")

    llm.submit(PROMPT, None, GREEDY)
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "run", endless)
        with pytest.raises(KeyboardInterrupt):
            llm.step()
    llm.engine.check_integrity()
    llm.run()


def test_leaving_with_closes(model):
    async def main():
        async with AsyncEngine(model, **SIZES) as engine:
            assert (await engine.complete(PROMPT, GREEDY)).outputs[0].text
        with pytest.raises(EngineClosedError):
            await engine.complete(PROMPT, GREEDY)

    threads = set(threading.enumerate())
    asyncio.run(main())
    with LLM(model, **SIZES) as llm:
        assert llm.generate(PROMPT, GREEDY)[0].outputs[0].text
    with pytest.raises(EngineClosedError):
        llm.generate(PROMPT, GREEDY)
    assert set(threading.enumerate()) <= threads


def test_a_closed_llm_says_so(model):
    llm = LLM(model, **SIZES)
    llm.generate(PROMPT, GREEDY)
    llm.close()
    with pytest.raises(EngineClosedError):
        llm.generate(PROMPT, GREEDY)


def test_an_llm_that_nobody_has_is_gone(model, shelf):
    """Its threads would keep all its arrays."""
    threads = set(threading.enumerate())
    llm = LLM(model, **SIZES)
    llm.add_lora("a1", shelf[1], load=False)
    llm.generate(PROMPT, GREEDY, LoRARequest("a1"))
    mine = set(threading.enumerate()) - threads
    team = weakref.ref(llm.engine.runner.team)
    assert {thread.name for thread in mine} == {"minilora-1", "minilora-loader"}
    del llm
    gc.collect()
    for thread in mine:
        thread.join(30)
    gc.collect()
    assert not any(thread.is_alive() for thread in mine) and team() is None


def test_closing_wakes_a_thread_that_falls_asleep(model):
    """Whatever is set while the thread looks for work is not overlooked."""
    entered, go = threading.Event(), threading.Event()

    class Slow(threading.Event):
        def clear(self):
            entered.set()
            go.wait(30)
            super().clear()

    engine = AsyncEngine(model, **SIZES)
    old, engine._wake = engine._wake, Slow()
    old.set()
    assert entered.wait(30)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._wake.is_set():
        time.sleep(0.001)
    go.set()
    closing.join(30)
    assert not closing.is_alive()


def test_a_path_in_the_request_registers(llm, shelf, expected):
    for i in (0, 1, 1):
        [answer] = llm.generate(PROMPT, GREEDY, LoRARequest("by-path", lora_path=shelf[i]))
        assert answer.outputs[0].text == expected[f"a{i}"]
    llm.remove_lora("by-path")


def test_a_path_in_the_request_registers_again_what_its_name_meant_before(llm, shelf, expected):
    lora = LoRARequest("by-path", lora_path=shelf[0])
    arrays = peft_tensors(CONFIG, 5, LINEAR[:7], 1), {"r": 5, "lora_alpha": 10}
    for forget in (llm.remove_lora, lambda name: llm.add_lora(name, *arrays), llm.remove_lora):
        assert llm.generate(PROMPT, GREEDY, lora)[0].outputs[0].text == expected["a0"]
        forget("by-path")
