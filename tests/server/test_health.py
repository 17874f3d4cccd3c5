"""S17: what goes wrong in one request stays there, and an engine that is dead or stuck is said to be."""

import asyncio
import json
import threading
import time
from contextlib import contextmanager

import httpx
import pytest

from minilora import AsyncEngine
from minilora.outputs import TextBuilder
from minilora.server import ServerConfig, create_app, health

from .conftest import SIZES, assert_idle, served
from .raw import HOST, ask, bearer

SECRET = "/root/secret/path.py line 17 at 0x7f00"
VICTIM = 777


def body_of(i=0, **fields):
    return {
        "model": "tiny",
        "prompt": f"Neighbour {i} says",
        "max_tokens": 12,
        "temperature": 0.9,
        "seed": i,
        "ignore_eos": True,
        **fields,
    }


class InjectedError(RuntimeError):
    """An error that nobody expects."""


def fail_once(armed, condition=lambda *a, **k: True):
    """Wraps a function: the first call for which the condition holds, once it is armed, fails."""

    def wrap(function):
        def wrapped(*args, **kwargs):
            if armed and condition(*args, **kwargs):
                armed.clear()
                raise InjectedError(SECRET)
            return function(*args, **kwargs)

        return wrapped

    return wrap


def replace(monkeypatch, holder, name, wrap):
    monkeypatch.setattr(holder, name, wrap(getattr(holder, name)))


def in_encode(monkeypatch, engine, armed):
    replace(monkeypatch, engine.tokenizer, "encode", fail_once(armed, lambda text, *a, **k: "victim" in text))


def in_submit(monkeypatch, engine, armed):
    replace(
        monkeypatch,
        engine._llm.engine,
        "submit",
        fail_once(armed, lambda tokens, params, *a, **k: params.seed == VICTIM),
    )


def in_sampling(monkeypatch, engine, armed):
    """The sampler reports an error for a row of its own."""
    sampler = engine._llm.engine.runner.sampler
    draw = sampler.draw

    def failing(draws, chosen):
        drawn = draw(draws, chosen)
        for i, one in enumerate(draws):
            if armed and one.params.seed == VICTIM and one.position > 18:
                armed.clear()
                drawn[0][i] = InjectedError(SECRET)
        return drawn

    monkeypatch.setattr(sampler, "draw", failing)


def in_decoding(monkeypatch, engine, armed):
    replace(
        monkeypatch,
        TextBuilder,
        "add",
        fail_once(armed, lambda self, *a: self.sequence.params.seed == VICTIM and len(self.output.token_ids) == 3),
    )


STAGES = [in_encode, in_submit, in_sampling, in_decoding]


@pytest.fixture(scope="module")
def running(serve):
    server = serve()
    server.expected = [server.client.post("/v1/completions", json=body_of(i)).json() for i in range(4)]
    return server


def texts(answers):
    return [answer["choices"][0]["text"] for answer in answers]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("stream", [False, True])
def test_s17_an_error_stays_in_its_request(running, monkeypatch, caplog, stage, stream):
    """The victim is told of an error under an id that the log has, without detail; its neighbours get their texts."""
    armed = [True]
    stage(monkeypatch, running.engine, armed)

    async def run():
        async with httpx.AsyncClient(base_url=running.url, timeout=60, trust_env=False) as client:
            bodies = [body_of(i) for i in range(4)]
            bodies.append(body_of(prompt="the victim says", seed=VICTIM, stream=stream))
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))

    *neighbours, victim = asyncio.run(run())
    assert not armed, "nothing was injected"
    assert texts(answer.json() for answer in neighbours) == texts(running.expected)
    if victim.headers["content-type"].startswith("text/event-stream"):
        assert stream and stage in (in_sampling, in_decoding)
        *_, last, done = [part for part in victim.text.split("\n\n") if part.startswith("data: ")]
        assert done == "data: [DONE]"
        error = json.loads(last.removeprefix("data: "))["error"]
    else:
        assert victim.status_code == 500
        error = victim.json()["error"]
    assert error["type"] == "server_error" and error["code"] == "internal_error"
    identity = victim.headers["x-request-id"]
    assert identity in error["message"] and SECRET not in victim.text and "Injected" not in victim.text
    assert any(identity in record.getMessage() and record.exc_info for record in caplog.records)
    assert running.client.get("/health").status_code == 200
    assert_idle(running)


def test_s17_a_failed_step_ends_what_was_in_it_only(running, monkeypatch):
    armed = [True]
    replace(monkeypatch, running.engine._llm.engine.runner, "run", fail_once(armed))
    victim = running.client.post("/v1/completions", json=body_of(seed=VICTIM))
    assert victim.status_code == 500 and SECRET not in victim.text
    assert texts([running.client.post("/v1/completions", json=body_of(2)).json()]) == [texts(running.expected)[2]]
    assert_idle(running)


def test_s17_a_callback_and_a_text_that_fail_end_with_their_pages_free(running, monkeypatch):
    """Many times in a row: nothing is kept of those that failed."""
    for _ in range(20):
        armed = [True]
        with monkeypatch.context() as patch:
            in_decoding(patch, running.engine, armed)
            assert running.client.post("/v1/completions", json=body_of(seed=VICTIM)).status_code == 500
        assert_idle(running)


# ---------------------------------------------------------------- a dead engine


@contextmanager
def mortal(model, **options):
    """A server of its own, for an engine that may die."""
    engine = AsyncEngine(model, **SIZES)
    try:
        with served(engine, ServerConfig(served_model_name=("tiny",), **options)) as server:
            yield server
    finally:
        engine.close()


@pytest.mark.parametrize("where", ["step", "deliver"])
@pytest.mark.parametrize("error", [InjectedError(SECRET), SystemExit(SECRET), KeyboardInterrupt(), MemoryError()])
def test_s17_health_tells_of_the_engines_death(model, where, error):
    """Whatever the thread dies of: from that moment on /health says so, and requests end with a clean error."""
    with mortal(model) as server:
        assert [server.client.get(path).status_code for path in ("/health", "/ready")] == [200, 200]

        def die(*args):
            raise error

        if where == "step":
            server.engine._llm.step = die
        else:
            server.engine._deliver = die
        answer = server.client.post("/v1/completions", json=body_of(stream=where == "step"))
        assert answer.status_code == 503 and SECRET not in answer.text
        assert answer.json()["error"]["code"] == "engine_dead"
        assert [server.client.get(path).status_code for path in ("/health", "/ready")] == [503, 503]
        assert server.client.get("/health").json()["error"]["message"] == "the engine has stopped"
        assert server.client.post("/v1/completions", json=body_of()).status_code == 503
        assert "minilora:engine_up{" in server.client.get("/metrics").text
        assert server.app.state.server.gate.active == 0


def test_s17_streams_end_with_the_engine(model):
    """Those under way are told, not left hanging."""
    with mortal(model) as server:
        dead = threading.Event()
        step = server.engine._llm.step

        def die_when_told():
            if dead.is_set():
                raise InjectedError(SECRET)
            return step()

        server.engine._llm.step = die_when_told
        with server.client.stream("POST", "/v1/completions", json=body_of(stream=True, max_tokens=450)) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            dead.set()
            rest = [line for line in lines if line]
        assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert rest[-1] == "data: [DONE]"
        assert server.client.get("/health").status_code == 503


def test_s17_a_stuck_engine_is_not_healthy(model, monkeypatch):
    """A step that never ends looks like one that is dead; one that ends after all is forgiven."""
    monkeypatch.setattr(health, "LONGEST_STEP", 0.2)
    with mortal(model) as server:
        go_on, step = threading.Event(), server.engine._llm.step

        def hang():
            assert go_on.wait(60)
            return step()

        assert server.client.get("/health").status_code == 200
        server.engine._llm.step = hang
        worker = threading.Thread(target=server.client.post, args=("/v1/completions",), kwargs={"json": body_of()})
        worker.start()
        try:
            while server.engine.stuck_for < 0.2:
                time.sleep(0.01)
            assert server.client.get("/health").status_code == 503
        finally:
            go_on.set()
            worker.join(60)
        # The answer is out before the step that it comes from is over.
        end = time.monotonic() + 10
        while server.engine.stuck_for and time.monotonic() < end:
            time.sleep(0.01)
        assert server.client.get("/health").status_code == 200 and server.engine.stuck_for == 0


def test_ready_is_over_before_health(model):
    with mortal(model) as server:
        server.app.state.server.gate.drain()
        assert [server.client.get(path).status_code for path in ("/ready", "/health")] == [503, 200]
        assert int(server.client.get("/ready").headers["retry-after"]) >= 1
        answer = server.client.post("/v1/completions", json=body_of())
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "draining"


def test_head_is_as_good_as_get(running):
    assert [running.client.head(path).status_code for path in ("/health", "/ready")] == [200, 200]


def test_health_tells_strangers_nothing(model):
    engine = AsyncEngine(model, **SIZES)
    try:
        app = create_app(engine, ServerConfig(api_keys=("k",)))
        for path in ("/health", "/ready"):
            answer = ask(app, path=path)
            assert (answer.status, answer.body) == (200, b"")
        version = ask(app, path="/version", headers=(HOST, bearer("k")))
        assert json.loads(version.body).keys() == {"version"}
    finally:
        engine.close()
