"""bench/soak_http.py's checks: what they let pass and what they object to. And that its client can leave."""

import asyncio
import json
import random
import sys
import types
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

from http_checks import (  # noqa: E402
    IDLE,
    adapters_of,
    draw_request,
    fault,
    held,
    is_clean_refusal,
    read,
    repetition,
    slope,
    times_of,
    waited_too_long,
)
from http_client import Answer, Client  # noqa: E402

from .conftest import MODEL, assert_idle  # noqa: E402

SIZES = types.SimpleNamespace(prompt=(2, 9), generate=(5, 5), vocab_size=200)
BODY = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "seed": 1, "ignore_eos": True}
BODY |= {"return_token_ids": True, "stream": False}


def answer(status, content, **headers):
    return Answer(status, [(0.0, json.dumps(content).encode())], headers)


def completion(tokens=(1, 2, 3, 4), finish_reason="length", **usage):
    used = {"prompt_tokens": 3, "completion_tokens": len(tokens), "total_tokens": 3 + len(tokens), **usage}
    return {"model": MODEL, "choices": [{"token_ids": list(tokens), "finish_reason": finish_reason}], "usage": used}


def test_random_requests_are_what_the_server_takes(server):
    rng, kinds = random.Random(3), set()
    for _ in range(40):
        body = draw_request(rng, MODEL, ["a0", "a1", "a2"], SIZES)
        kinds.add((body["model"] == MODEL, "lora" in body, body["stream"]))
        assert {name for name, _ in adapters_of(body, MODEL)} <= {"a0", "a1", "a2"}
        got = server.client.post("/v1/completions", json=body)
        found = Answer(got.status_code, [(0.0, got.content)], dict(got.headers))
        assert got.status_code == 200 and fault(body, read(found)) == "", got.text
        if "lora" not in body:
            names = [name for name, _ in adapters_of(body, MODEL)]
            again = server.client.post("/v1/completions", json=repetition(body, MODEL, names)).json()
            assert again["choices"][0]["token_ids"] == read(found).tokens
    assert len(kinds) == 6, "by name, the base and lists, each streamed and not"


def test_a_repetition_names_the_versions():
    body = {**BODY, "stream": True, "stream_options": {}, "lora": [{"name": "x", "scale": 0.5}]}
    assert repetition(body, MODEL, ["v3"]) == {**BODY, "lora": [{"name": "v3", "scale": 0.5}]}
    assert repetition({**BODY, "model": "x"}, MODEL, ["v3"])["lora"] == [{"name": "v3", "scale": 1.0}]
    assert repetition(BODY, MODEL, []) == BODY


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (completion(), ""),
        (completion(finish_reason="stop"), ""),
        (completion((1, 2)), "2 of 4 tokens"),
        (completion((1, 2), "stop"), "2 of 4 tokens"),
        (completion((1, 2, 3, 4, 5)), "5 of 4 tokens"),
        (completion(finish_reason=None), "then None"),
        (completion(prompt_tokens=2), "usage"),
        (completion(completion_tokens=5), "usage"),
        ({**completion(), "usage": None}, "usage"),
        ({**completion(), "model": "a0"}, "from 'a0'"),
        ({"error": {"code": "internal_error"}}, "internal_error"),
    ],
)
def test_faults(content, said):
    found = fault(BODY, read(answer(200, content)))
    assert said in found and bool(said) == bool(found)


def test_a_text_may_stop_where_it_is_allowed_to():
    body = {**BODY, "ignore_eos": False}
    assert fault(body, read(answer(200, completion((1, 2), "stop")))) == ""
    assert "0 of 4" in fault(body, read(answer(200, completion((), "stop"))))


def test_a_stream_without_its_end():
    events = [{**completion((1, 2), None), "usage": None}, completion((3, 4), "length", completion_tokens=4)]
    events[1]["usage"]["total_tokens"] = 7
    data = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events)
    headers = {"content-type": "text/event-stream; charset=utf-8"}
    whole = Answer(200, [(0.0, data + b"data: [DONE]\n\n")], headers)
    assert read(whole).tokens == [1, 2, 3, 4] and fault(BODY, read(whole)) == ""
    assert "end is missing" in fault(BODY, read(Answer(200, [(0.0, data)], headers)))


def test_times_are_those_of_text():
    event = b"data: " + json.dumps({**completion((1,), None), "usage": None}).encode() + b"\n\n"
    usage = b"data: " + json.dumps({**completion(), "choices": []}).encode() + b"\n\ndata: [DONE]\n\n"
    headers = {"content-type": "text/event-stream; charset=utf-8"}
    pieces = [(15.0, b": still working\n\n"), (16.0, event[:9]), (17.0, event[9:]), (18.0, event), (19.0, usage)]
    assert times_of(Answer(200, pieces, headers)) == [17.0, 18.0]
    assert times_of(Answer(200, [(1.0, b"{"), (2.0, b"}")], {"content-type": "application/json"})) == [2.0]


def test_a_turn_that_did_not_come():
    expired = {"error": {"code": "queue_timeout"}}
    assert waited_too_long(read(answer(503, expired))) and not waited_too_long(read(answer(200, completion())))
    late = [{**completion((1,), None), "usage": None}, expired]
    data = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in late) + b"data: [DONE]\n\n"
    assert not waited_too_long(read(Answer(200, [(0.0, data)], {"content-type": "text/event-stream"})))


def test_refusals():
    error = {"error": {"message": "full", "type": "overloaded_error", "param": None, "code": "queue_full"}}
    waits = {"retry-after": "3"}
    assert is_clean_refusal(answer(503, error, **waits)) and is_clean_refusal(answer(429, error, **waits))
    assert not is_clean_refusal(answer(503, error)) and not is_clean_refusal(answer(500, error, **waits))
    assert not is_clean_refusal(answer(503, error, **{"retry-after": "0"}))
    assert not is_clean_refusal(answer(503, "full", **waits)) and not is_clean_refusal(Answer(503, [], waits))


def test_what_a_server_holds(server):
    metrics = server.client.get("/metrics").text
    assert held(metrics) == {}
    line = next(line for line in metrics.splitlines() if line.startswith(f"{IDLE[0]}{{"))
    assert held(metrics.replace(line, line.replace(" 0.0", " 2.0"))) == {IDLE[0]: 2.0}
    with pytest.raises(KeyError):
        held(metrics.replace(line, ""))


def test_growth_is_that_of_the_floor_after_the_warm_up():
    def memory(second):
        return 100.0 + min(second, 60) + second / 120 + (40 if second % 7 < 3 else 0)

    samples = [(float(second), memory(second)) for second in range(600)]
    assert slope(samples, 60) == pytest.approx(0.5, abs=0.1) and slope(samples, 0) > 2
    assert slope(samples, 590) is None


def test_a_client_that_leaves(server):
    body = {**BODY, "max_tokens": 300, "stream": True}

    async def run():
        client = Client(server.url)
        left = await client.send(client.request("/v1/completions", body), 3)
        kept = await client.send(client.request("/v1/completions", {**body, "max_tokens": 4}))
        client.close()
        return left, kept

    left, kept = asyncio.run(run())
    assert len(left.pieces) == 3 and left.status == 200 and not read(left).whole
    assert read(kept).whole and len(read(kept).tokens) == 4
    assert_idle(server)
