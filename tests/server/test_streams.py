"""Streams and their ends: clients that leave, time limits, signs of life, errors on the way."""

import asyncio
import json
import socket
import time

import httpx
import pytest

from minilora.errors import QueueTimeoutError
from minilora.server.failures import ApiError
from minilora.server.stream import EventStream, attended, event

from .conftest import MODEL, assert_idle

LONG = {"model": MODEL, "prompt": "Hi", "max_tokens": 500, "ignore_eos": True, "n": 4}


def wait_until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.002)


@pytest.fixture(scope="module")
def slow(serve, shelf):
    """A server whose texts are long enough to be left."""
    running = serve(lora_dir=shelf, engine={"max_model_len": 60_000, "debug_checks": False, "kv_cache_memory": 1 << 28})
    yield running
    assert_idle(running)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_request(slow, stream, path):
    """Streamed or not: nothing of it is left in the engine or at the gate."""
    body = {**LONG, "max_tokens": 50_000, "stream": stream, "n": 2}
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    with httpx.Client(base_url=slow.url, timeout=60, trust_env=False) as client:
        if stream:
            with client.stream("POST", path, json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(path, json=body, timeout=0.3)
    wait_until(lambda: not slow.app.state.server.gate.active)
    assert_idle(slow)


def test_leaving_frees_within_two_steps(slow, monkeypatch):
    """Counted in steps: from the order that the closing of the application's events gives to when it is carried out."""
    server, told, freed = slow.app.state.server, [], []
    engine, post, abort = server.engine, server.engine._post, server.engine._abort

    def steps():
        return engine._llm.engine._recorder.steps

    monkeypatch.setattr(engine, "_post", lambda act: (post(act), told.append(steps())))
    monkeypatch.setattr(engine, "_abort", lambda stream: (abort(stream), freed.append(steps())))

    async def main():
        from minilora.server.generation import Job

        job = Job(server, MODEL, "x", "x", "prompt", lambda: [[5, 6]], 1, ("max_tokens", None), _params(), (), "", {})
        deltas = job.deltas()
        await anext(deltas)
        assert not told
        await deltas.aclose()
        assert len(told) == 1
        stats = await engine.stats()
        assert stats.running == stats.waiting == 0 and len(freed) == 1 and freed[0] - told[0] <= 2

    # The gate belongs to the server's loop, which does nothing meanwhile.
    asyncio.run(main())


def _params():
    from minilora import SamplingParams

    return SamplingParams(max_tokens=50_000, ignore_eos=True)


def test_a_request_that_takes_too_long(serve):
    running = serve(request_timeout=0.3, engine={"max_model_len": 60_000, "debug_checks": False})
    body = {**LONG, "max_tokens": 59_000, "n": 1}
    answer = running.client.post("/v1/completions", json=body)
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "request_timeout"
    assert "0.3 seconds, this server's request_timeout" in answer.json()["error"]["message"]
    with running.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert answer.status_code == 200 and lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2][6:])["error"]["code"] == "request_timeout"
    assert_idle(running)


def test_a_request_that_waits_too_long(serve):
    """It gets a 503 of its own, with Retry-After, streamed or not; the one that runs goes on."""
    running = serve(queue_timeout=0.2, engine={"max_num_seqs": 1, "max_model_len": 60_000, "debug_checks": False})
    body = {**LONG, "n": 1, "max_tokens": 59_000, "stream": True}
    with running.client.stream("POST", "/v1/completions", json=body) as busy:
        lines = busy.iter_lines()
        next(lines)
        for stream in (False, True):
            answer = running.client.post("/v1/completions", json={**body, "max_tokens": 2, "stream": stream})
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "queue_timeout", answer.text
            assert int(answer.headers["Retry-After"]) > 0
        assert any(line.startswith("data: {") for line in lines)
    wait_until(lambda: not running.app.state.server.gate.active)
    assert_idle(running)


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_behind_others_of_their_request_do_not_wait_too_long(serve, stream):
    running = serve(queue_timeout=0.2, engine={"max_num_seqs": 1, "max_model_len": 60_000, "debug_checks": False})
    body = {**LONG, "n": 1, "prompt": ["a", "b"], "max_tokens": 3000, "stream": stream}
    answer = running.client.post("/v1/completions", json=body)
    assert answer.status_code == 200 and answer.text.count('"length"') == 2 and "queue_timeout" not in answer.text
    assert_idle(running)


def test_no_packet_waits_for_another(server):
    """Connections are without Nagle's algorithm, which holds the second piece of an answer back for 40 ms."""
    assert server.client.get("/health").status_code == 200
    sockets = [connection.transport.get_extra_info("socket") for connection in server.web.server_state.connections]
    assert sockets and all(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for one in sockets)


def test_n_is_all_or_nothing(serve):
    running = serve(max_num_queued_reqs=0)
    answer = running.client.post("/v1/completions", json={**LONG, "n": 8, "prompt": ["a", "b"], "max_tokens": 2})
    assert answer.status_code == 400 and "max_num_queued_reqs" in answer.json()["error"]["message"]
    assert_idle(running)


# ---------------------------------------------------------------- the events themselves


class Client:
    """An ASGI client: what was sent to it; it stays until `leave` is called."""

    def __init__(self):
        self.sent, self._left = [], asyncio.Event()

    async def receive(self):
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)

    def leave(self):
        self._left.set()

    @property
    def body(self):
        return b"".join(message.get("body", b"") for message in self.sent)


def run(events, seconds=5.0, ping=5.0, act=None):
    """Send events to a Client, which is returned."""

    async def main():
        client = Client()
        task = asyncio.ensure_future(EventStream(events, "id", seconds, ping)({}, client.receive, client.send))
        if act is not None:
            await act(client)
        await task
        return client

    return asyncio.run(main())


async def numbers(pause=0.0, count=3, error=None, closed=None):
    try:
        for i in range(count):
            await asyncio.sleep(pause)
            yield b"data: %d\n\n" % i
        if error:
            raise error
    finally:
        if closed is not None:
            closed.append(True)


def test_events_and_their_headers():
    client = run(numbers())
    assert client.body == b"data: 0\n\ndata: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
    start = client.sent[0]
    headers = dict(start["headers"])
    assert start["status"] == 200 and headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"x-accel-buffering"] == b"no" and b"content-length" not in headers
    assert not client.sent[-1].get("more_body")


def test_an_event_is_one_line():
    """For clients too that split where Unicode would."""
    data = event({"text": "".join(map(chr, [*range(0x100), 0x2028, 0x2029, 0x1F600]))})
    assert len(data.decode().splitlines()) == 2 and data.endswith(b"\n\n")
    assert json.loads(data[6:])["text"].endswith("\u2028\u2029\U0001f600")


def test_signs_of_life():
    client = run(numbers(pause=0.25, count=2), ping=0.1)
    assert client.sent[0]["status"] == 200 and client.sent[1]["body"].startswith(b": ")
    assert client.body.count(b": ") >= 4 and b"data: 1" in client.body
    assert b": still" not in run(numbers(pause=0.02, count=10), ping=0.1).body


def test_an_error_before_the_first_event_has_its_status():
    for error in (ApiError(429, "no"), QueueTimeoutError("late"), ValueError("x")):
        with pytest.raises(type(error)):
            run(numbers(count=0, error=error))


def test_an_error_after_it_is_an_event():
    client = run(numbers(count=2, error=ApiError(429, "no", None, "code")))
    assert client.sent[0]["status"] == 200
    assert b'"code":"code"' in client.body and client.body.endswith(b"data: [DONE]\n\n")
    assert not client.sent[-1].get("more_body")
    assert b"secret" not in run(numbers(count=1, error=ValueError("secret"))).body


def test_who_leaves_ends_the_events():
    closed = []

    async def leave(client):
        while not client.sent:
            await asyncio.sleep(0)
        client.leave()

    client = run(numbers(pause=0.01, count=10**6, closed=closed), act=leave)
    assert closed == [True] and b"[DONE]" not in client.body


def test_time_is_up_ends_the_events():
    closed = []
    with pytest.raises(ApiError, match=r"longer than 0\.05 seconds"):
        run(numbers(pause=10, closed=closed), seconds=0.05)
    assert closed == [True]


def test_attended_work():
    async def main():
        client = Client()
        assert await attended(client.receive, asyncio.sleep(0, "result"), 5) == "result"
        with pytest.raises(ApiError, match="request_timeout"):
            await attended(client.receive, asyncio.sleep(10), 0.01)
        client.leave()
        assert await attended(client.receive, asyncio.sleep(10, "never"), 5) is None

    asyncio.run(main())
