"""The gate: how many are let in, what the others are told, and that nothing is left behind afterwards."""

import asyncio
import random
import types

import httpx
import pytest

from minilora.errors import UsageError
from minilora.params import EngineConfig
from minilora.server import ServerConfig, admission
from minilora.server.admission import LONGEST_WAIT, Gate
from minilora.server.failures import ApiError

from .conftest import assert_idle


def make(running=2, **options):
    return Gate(
        ServerConfig(api_keys=("k",), **options), types.SimpleNamespace(config=EngineConfig(max_num_seqs=running))
    )


def drive(coroutine):
    """The result of a coroutine that never waits: letting in is decided at once."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits")


def refused(gate, key="", sequences=1):
    with pytest.raises(ApiError) as error:
        drive(gate.admit(key, sequences).__aenter__())
    assert 1 <= error.value.retry_after <= LONGEST_WAIT and isinstance(error.value.retry_after, int)
    return error.value


class Inside:
    """Requests that are let in and stay until they are told to leave."""

    def __init__(self, gate):
        self.gate, self.held = gate, []

    def enter(self, key="", sequences=1):
        ticket = self.gate.admit(key, sequences)
        drive(ticket.__aenter__())
        self.held.append(ticket)

    def leave(self):
        drive(self.held.pop(0).__aexit__(None, None, None))


# ---------------------------------------------------------------- the gate alone


def test_a_full_gate_refuses_at_once_and_lets_in_again():
    gate = make(running=2, max_num_queued_reqs=3)
    inside = Inside(gate)
    for count in range(1, 6):
        inside.enter()
        assert gate.active == count and gate.waiting == max(0, count - 2)
    error = refused(gate)
    assert error.status == 503 and error.code == "queue_full" and gate.rejections["queue_full"] == 1
    inside.leave()
    inside.enter()
    refused(gate)
    for _ in range(5):
        inside.leave()
    assert gate.active == gate.waiting == 0 and gate.rejections == {"queue_full": 2, "key_limit": 0, "draining": 0}


def test_a_queue_of_nobody():
    gate = make(running=2, max_num_queued_reqs=0)
    inside = Inside(gate)
    inside.enter()
    inside.enter()
    assert refused(gate).status == 503


def test_all_texts_of_a_request_or_none():
    gate = make(running=2, max_num_queued_reqs=3)
    inside = Inside(gate)
    inside.enter(sequences=3)
    refused(gate, sequences=3)
    assert gate.active == 3
    inside.enter(sequences=2)
    assert refused(gate).code == "queue_full"


def test_what_never_fits_is_no_matter_of_waiting():
    gate = make(running=2, max_num_queued_reqs=3, max_queued_per_key=2)
    for key, sequences, most in (("", 6, 5), ("k", 3, 2)):
        with pytest.raises(
            UsageError, match=rf"max_(queued_per_key|num_seqs and max_num_queued_reqs together), {most}"
        ):
            drive(gate.admit(key, sequences).__aenter__())
    assert gate.active == 0 and not any(gate.rejections.values())


def test_one_key_does_not_take_all():
    gate = make(running=2, max_num_queued_reqs=10, max_queued_per_key=2)
    inside = Inside(gate)
    inside.enter("one", 2)
    error = refused(gate, "one")
    assert error.status == 429 and error.code == "key_limit" and "one" not in error.cause
    inside.enter("two")
    inside.enter("")
    inside.leave()
    inside.enter("one")
    assert gate.active == 3
    while gate.active:
        inside.leave()
    assert not gate._by_key, "keys that are gone are remembered"


def test_a_draining_gate_lets_out_only():
    gate = make()
    inside = Inside(gate)
    inside.enter()
    gate.drain()
    error = refused(gate)
    assert error.code == "draining" and error.retry_after and gate.rejections["draining"] == 1

    async def drained():
        waiting = asyncio.ensure_future(gate.emptied())
        await asyncio.sleep(0)
        assert not waiting.done()
        inside.leave()
        await asyncio.wait_for(waiting, 5)

    asyncio.run(drained())
    assert gate.active == 0


def test_errors_inside_give_the_place_back():
    gate = make()

    async def fail(error):
        async with gate.admit("k", 2):
            raise error

    for error in (ValueError(), asyncio.CancelledError()):
        with pytest.raises(type(error)):
            asyncio.run(fail(error))
        assert gate.active == 0


def test_retry_after_follows_the_measured_rate(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(admission.time, "monotonic", lambda: now[0])
    gate = make(running=2, max_num_queued_reqs=20)
    inside = Inside(gate)
    assert gate.retry_after() == 1
    for _ in range(22):
        inside.enter()
    for _ in range(10):
        now[0] += 0.5
        inside.leave()
        inside.enter()
    # Ten in 4.5 seconds, and 21 to begin.
    assert gate.retry_after() == 10 == refused(gate).retry_after
    assert gate.retry_after(5) == 12
    now[0] += 1000
    assert gate.retry_after() == LONGEST_WAIT


@pytest.mark.parametrize("seed", range(5))
def test_random_comings_and_goings(seed):
    rng, gate = random.Random(seed), make(running=3, max_num_queued_reqs=9, max_queued_per_key=5)
    held = []

    async def run():
        for _ in range(2000):
            if held and rng.random() < 0.5:
                _, _, ticket = held.pop(rng.randrange(len(held)))
                await ticket.__aexit__(None, None, None)
            else:
                key, count = rng.choice(["", "a", "b"]), rng.randint(1, 4)
                fits = sum(n for _, n, _ in held) + count <= 12
                fits_key = not key or sum(n for k, n, _ in held if k == key) + count <= 5
                ticket = gate.admit(key, count)
                if fits and fits_key:
                    await ticket.__aenter__()
                    held.append((key, count, ticket))
                else:
                    with pytest.raises(ApiError) as error:
                        await ticket.__aenter__()
                    assert error.value.status == (503 if fits_key else 429)
            assert gate.active == sum(n for _, n, _ in held) <= 12

    asyncio.run(run())


# ---------------------------------------------------------------- overload of a real server


def body_of(i, **fields):
    return {
        "model": ("tiny", "a0", "a1")[i % 3],
        "prompt": f"Client {i % 7} says",
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "stream": i % 2 == 0,
        **fields,
    }


async def one(client, i, **fields):
    """(status, text, headers) of a request; the text of a stream that is not complete is None."""
    async with client.stream("POST", "/v1/completions", json=body_of(i, **fields)) as answer:
        data = (await answer.aread()).decode()
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            return answer.status_code, error["code"], answer.headers
        if not body_of(i, **fields)["stream"]:
            return 200, answer.json()["choices"][0]["text"], answer.headers
        events = [line.removeprefix("data: ") for line in data.split("\n\n") if line.startswith("data: ")]
        if events[-1] != "[DONE]":
            return 200, None, answer.headers
        choices = [httpx.Response(200, content=event).json()["choices"] for event in events[:-1]]
        return 200, "".join(choice[0]["text"] for choice in choices if choice), answer.headers


def crowd(server, count, headers=None, **fields):
    """The answers to so many clients at once, each with its own connection."""

    async def run():
        limits = httpx.Limits(max_connections=None)
        client = httpx.AsyncClient(
            base_url=server.url, timeout=120, trust_env=False, limits=limits, headers=headers or server.client.headers
        )
        async with client:
            return await asyncio.gather(*(one(client, i, **fields) for i in range(count)))

    return asyncio.run(run())


def test_overload(serve, shelf):
    """200 clients against a queue of 32: complete answers or clean refusals; then all is as before."""
    server = serve(lora_dir=shelf, max_num_queued_reqs=32, engine={"max_num_seqs": 4})
    expected = {}
    for i in range(21):
        [(status, text, _)] = [asyncio.run(alone(server, i))]
        assert status == 200 and len(text) >= 1
        expected[body_of(i)["model"], body_of(i)["prompt"]] = text
    for _ in range(2):
        answers = crowd(server, 200)
        admitted = [(i, text) for i, (status, text, _) in enumerate(answers) if status == 200]
        rejected = [(code, headers) for status, code, headers in answers if status != 200]
        assert 36 <= len(admitted) < 200
        for i, text in admitted:
            assert text == expected[body_of(i)["model"], body_of(i)["prompt"]]
        for code, headers in rejected:
            assert code == "queue_full" and 1 <= int(headers["retry-after"]) <= LONGEST_WAIT
        assert {status for status, _, _ in answers} == {200, 503}
        assert_idle(server)
        gate = server.app.state.server.gate
        assert gate.active == gate.waiting == 0 and server.client.get("/health").status_code == 200
    assert asyncio.run(alone(server, 3))[1] == expected[body_of(3)["model"], body_of(3)["prompt"]]
    metrics = server.client.get("/metrics").text
    count = [line for line in metrics.splitlines() if line.startswith("vllm:admission_rejections_total{")]
    assert any(
        'reason="queue_full"' in line and float(line.split()[-1]) == gate.rejections["queue_full"] for line in count
    )
    assert gate.rejections["queue_full"] > 0


async def alone(server, i):
    async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as client:
        return await one(client, i)


def test_overload_by_clients_that_leave(serve, shelf):
    """Half of a crowd gives up at a random moment; the places are free again, and the others' answers whole."""
    server = serve(lora_dir=shelf, max_num_queued_reqs=64, engine={"max_num_seqs": 4})
    rng = random.Random(3)

    async def impatient(client, i):
        try:
            return await asyncio.wait_for(one(client, i, max_tokens=60), rng.uniform(0.0, 1.0))
        except TimeoutError:
            return None

    async def run():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, trust_env=False, limits=limits) as client:
            works = [impatient(client, i) if i % 2 else one(client, i, max_tokens=60) for i in range(60)]
            answers = await asyncio.gather(*works)
        return answers

    answers = asyncio.run(run())
    assert all(status == 200 and text for status, text, _ in answers[::2])
    assert None in answers
    for _ in range(500):
        if not server.app.state.server.gate.active and not server.stats().running:
            break
        asyncio.run(asyncio.sleep(0.01))
    assert server.app.state.server.gate.active == 0
    assert_idle(server)


def test_a_greedy_key_is_told_429_and_another_is_served(serve):
    server = serve(api_keys=("one", "two"), max_queued_per_key=3, engine={"max_num_seqs": 2})

    async def run():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False, limits=limits) as client:
            works = []
            for key, count in (("one", 30), ("two", 3)):
                works += [keyed(client, i, key) for i in range(count)]
            return await asyncio.gather(*works)

    async def keyed(client, i, key):
        body = body_of(i, model="tiny", stream=False, max_tokens=50)
        return await client.post("/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"})

    answers = asyncio.run(run())
    assert [answer.status_code for answer in answers[30:]] == [200] * 3
    greedy = [answer.status_code for answer in answers[:30]]
    assert set(greedy) == {200, 429} and greedy.count(200) >= 3
    for answer in answers[:30]:
        if answer.status_code == 429:
            assert answer.json()["error"]["type"] == "rate_limit_error" and int(answer.headers["retry-after"]) >= 1
    assert_idle(server)
