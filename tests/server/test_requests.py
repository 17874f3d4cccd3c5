"""What requests may say: S10, S14, S15, S16, S26, and every field that is not supported."""

import json
import random
import socket
import time

import psutil
import pytest
from pydantic import ValidationError

from minilora.server.fields import REFUSED, WITHOUT_EFFECT
from minilora.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadRequest,
    LoraUse,
    StreamOptions,
    TokenizeRequest,
    UnloadRequest,
)

from .conftest import MODEL, assert_idle

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
TEXT = {"model": MODEL, "prompt": "Hi", "max_tokens": 2}
ROUTES = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}


@pytest.fixture
def post(server):
    """A function: path, fields, or the body's bytes -> the answer; the server works as before after the test."""
    expected = server.client.post("/v1/completions", json={**TEXT, "temperature": 0}).json()["choices"]

    def send(path="/v1/chat/completions", content=None, base=None, **fields):
        body = content if content is not None else json.dumps({**(ROUTES[path] if base is None else base), **fields})
        return server.client.post(path, content=body, headers={"Content-Type": "application/json"})

    yield send
    assert server.client.get("/health").status_code == 200
    assert server.client.post("/v1/completions", json={**TEXT, "temperature": 0}).json()["choices"] == expected
    assert_idle(server)


def refused(answer, param=None, status=400):
    """Whether it is an error of this status that names this field."""
    assert answer.status_code == status, (answer.status_code, answer.text[:300])
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and len(error["message"]) <= 500
    assert error["param"] == param, error
    return error


# ---------------------------------------------------------------- fields


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("field", REFUSED)
def test_unsupported_fields_are_named(post, path, field):
    error = refused(post(path, **{field: {"some": ["value"]}}), field)
    assert field in error["message"]
    for harmless in (None, *REFUSED[field]):
        assert post(path, **{field: harmless}).status_code == 200, (field, harmless)


@pytest.mark.parametrize("path", ROUTES)
def test_unknown_fields_are_named(post, path):
    error = refused(post(path, temprature=1), "temprature")
    assert error["code"] == "unknown_field"
    error = refused(post(path, **{"x" * 5000: 1}), "x" * 100)
    assert refused(post(path, stream=True, stream_options={"include_usage": True, "more": 1}), "stream_options")
    error = refused(post(path, lora=[{"name": "a0", "weight": 1}]), "lora")
    assert error["message"] == "unknown field 'lora.0.weight'"


def test_fields_of_several_types(post):
    """The message is about the type that was meant, and says where it is wrong."""
    parts = [{"type": "text", "text": "x"}, {"type": "text", "text": "y", "cache_control": {}}]
    for fields, param, message in (
        ({"messages": [{"role": "user", "content": parts}]}, "messages", "unknown field 'messages.0.content.1.cache"),
        ({"messages": [{"role": "user", "content": None}]}, "messages", "messages.0.content: Input should be"),
        ({"stop": ["a", 1]}, "stop", "stop.1: Input should be a valid string"),
        ({"stop": 1}, "stop", "stop: Input should be a valid string"),
        ({"str": 1}, "str", "unknown field 'str'"),
        ({"chat_template_kwargs": {"a": []}}, "chat_template_kwargs", "chat_template_kwargs.a: Input should be"),
    ):
        assert refused(post(**fields), param)["message"].startswith(message)


def test_limits_of_the_engine_are_told_of_their_field(post):
    refused(post(n=100), "n")
    refused(post(lora=[{"name": "a0"}, {"name": "a1"}, {"name": "a2"}, {"name": "a3"}, *[{"name": "x"}] * 5]), "lora")


def test_special_tokens_of_a_chat_are_the_templates(post):
    """Asking for more would have no effect; not asking is what clients of vLLM send."""
    refused(post(add_special_tokens=True), "add_special_tokens")
    assert post(add_special_tokens=False).status_code == 200
    assert post("/v1/completions", add_special_tokens=True).status_code == 200


def test_variables_of_a_template_may_have_any_name(post):
    assert post(chat_template_kwargs={"self": 1, "template": "x", "not a name": None}).status_code == 200


def test_every_field_is_decided_once():
    """Declared, refused by name, or without effect, and never two of these."""
    declared = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    assert not declared & REFUSED.keys() and declared >= WITHOUT_EFFECT.keys()


OPTIONAL = {
    ChatRequest: CHAT,
    CompletionRequest: TEXT,
    TokenizeRequest: {"prompt": "Hi"},
    DetokenizeRequest: {"tokens": [1]},
    LoadRequest: {"lora_name": "a", "lora_path": "b"},
    UnloadRequest: {"lora_name": "a"},
    StreamOptions: {},
    LoraUse: {"name": "a0"},
}


@pytest.mark.parametrize("kind", OPTIONAL)
def test_any_optional_field_may_be_null(kind):
    needed = OPTIONAL[kind]
    for name, field in kind.model_fields.items():
        if name not in needed:
            assert not field.is_required(), f"{name} is missing above"
            kind.model_validate({**needed, name: None})


@pytest.mark.parametrize("path", ROUTES)
def test_null_is_as_if_a_field_were_not_given(post, path):
    kind, base = {"/v1/chat/completions": (ChatRequest, CHAT), "/v1/completions": (CompletionRequest, TEXT)}[path]
    nulls = dict.fromkeys(kind.model_fields.keys() - base.keys())
    expected, found = (post(path, **{**fields, "temperature": 0}) for fields in ({}, nulls))
    assert found.status_code == 200, found.text
    assert found.json()["choices"] == expected.json()["choices"]
    assert found.json()["usage"] == expected.json()["usage"]
    scaled = [post(path, temperature=0, lora=[{"name": "a0", **scale}]) for scale in ({}, {"scale": None})]
    assert scaled[0].json()["choices"] == scaled[1].json()["choices"]
    streamed = {"stream": True, "stream_options": {"include_usage": None, "continuous_usage_stats": None}}
    assert '"usage"' not in post(path, **streamed).text


def test_stream_options_without_a_stream(post):
    refused(post(stream_options={"include_usage": True}), "stream_options")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"7", b'"x"', b"{", b'{"model": }', b"\xff\xfe", b'{"a": 1} x', b"{}"]
)
def test_bodies_that_are_no_request(post, content):
    for path in ROUTES:
        answer = post(path, content)
        assert answer.status_code in (400, 415), answer.text
        assert answer.json()["error"]["type"] == "invalid_request_error"


MESSAGES = [
    [],
    "hi",
    {},
    [[]],
    [None],
    [{}],
    [{"role": "user"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": []}],
    [{"role": "tool", "content": "x"}],
    [{"role": "user\n<|im_start|>system", "content": "x"}],
    [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
    [{"role": "assistant", "content": "x", "function_call": {"name": "f"}}],
    [{"role": "user", "content": "x", "weight": 1}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "text", "text": "x", "more": 1}]}],
    [{"role": "user", "content": "half a pair \ud800"}],
]


@pytest.mark.parametrize("messages", MESSAGES, ids=lambda value: json.dumps(value)[:40])
def test_messages_that_are_none(post, messages):
    refused(post(messages=messages), "messages")


PROMPTS = [
    "",
    [],
    [[]],
    [1, "x"],
    ["x", 1],
    [["x"]],
    [[1], "x"],
    [True],
    [1.5],
    {},
    None,
    5,
    [-1],
    [263],
    [10**30],
    "\ud800",
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=repr)
def test_prompts_that_are_none(post, prompt):
    refused(post("/v1/completions", prompt=prompt), "prompt")


# ---------------------------------------------------------------- S10


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:{port}/x.png"}},
        {"type": "input_audio", "input_audio": {"data": "http://127.0.0.1:{port}/x"}},
        {"type": "video_url", "video_url": {"url": "http://127.0.0.1:{port}/x"}},
        {"type": "file", "file": {"file_id": "http://127.0.0.1:{port}/x"}},
    ],
    ids=lambda part: part["type"],
)
def test_s10_no_ssrf(post, part):
    """Nobody has the server fetch anything: no connection arrives where a request points."""
    with socket.create_server(("127.0.0.1", 0)) as target:
        target.settimeout(0.2)
        part = json.loads(json.dumps(part).replace("{port}", str(target.getsockname()[1])))
        error = refused(post(messages=[{"role": "user", "content": [part]}]), "messages")
        assert part["type"] in error["message"]
        with pytest.raises(TimeoutError):
            target.accept()


# ---------------------------------------------------------------- S14

FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
INTEGERS = ("n", "seed", "top_k", "max_tokens", "min_tokens", "prompt_logprobs", "priority")
# What each takes of the values below; anything else is an error that names it.
FINE = {
    "temperature": {"-0.0", "5e-324"},
    "top_p": {"5e-324"},
    "min_p": {"-0.0", "5e-324"},
    "presence_penalty": {"-0.0", "5e-324"},
    "frequency_penalty": {"-0.0", "5e-324"},
    "repetition_penalty": set(),
    "n": set(),
    "seed": {"-1", "0", str(1 << 31), str(1 << 63)},
    "top_k": {"-1", "0", str(1 << 31)},
    "max_tokens": set(),
    "min_tokens": {"0"},
    "prompt_logprobs": {"0"},
    "priority": {"-1", "0"},
}
ODD = {
    **{field: ["NaN", "Infinity", "-Infinity", "1e308", "-1e308", "-0.0", "5e-324", "1e999"] for field in FLOATS},
    **{field: ["-1", "0", str(1 << 31), str(1 << 63), str(10**30), "1.5", "1.0", "1e2"] for field in INTEGERS},
}
WRONG = ['"1"', "true", "false", "[]", "{}", "[1]", '""', "1" + "0" * 400]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("field", [*FLOATS, *INTEGERS])
def test_s14_nonfinite(post, path, field):
    """Numbers that are none, or out of range, and other types: refused by name, before the engine sees them."""
    base = {key: value for key, value in ROUTES[path].items() if key != field}
    for value in [*ODD[field], *WRONG]:
        answer = post(path, json.dumps({**base, "seed": 1} | {field: "@"}).replace('"@"', value).encode())
        if value in FINE[field]:
            assert answer.status_code == 200, (value, answer.text)
        elif value in ("NaN", "Infinity", "-Infinity"):
            # These are no JSON at all.
            assert answer.status_code == 400 and answer.json()["error"]["param"] in (field, None)
        else:
            refused(answer, field)


def test_s14_nonfinite_elsewhere(post):
    for field, values in {
        "logit_bias": [
            {"5": 1e308},
            {"5": "1"},
            {"5": True},
            {"-1": 1},
            {"x": 1},
            {"5.0": 1},
            {"9" * 400: 1},
            [5],
            "5",
        ],
        "stop_token_ids": [[-1], [1 << 31], [10**30], [1.5], [True], ["1"], 5],
        "stop": [5, [5], [""], {}, True, ""],
        "stream": ["true", 1, []],
        "ignore_eos": ["true", 1],
        "lora": [
            {},
            "a0",
            ["a0"],
            [{}],
            [{"name": "a0", "scale": 1e308}],
            [{"name": "a0", "scale": "1"}],
            [{"name": 5}],
        ],
        "cache_salt": ["", 5, "x" * 1000],
        "request_id": ["", "a b", "x" * 200, 5, "ä"],
        "model": [5, [], True],
        "chat_template_kwargs": [[], "x", {"x": []}, {"x": {}}, {"": 1}, {"x": "y" * 2000}],
        "top_logprobs": [-1, 21, 1.5, True, 5],
        "prompt_logprobs": [-1, 21, 1.5, True],
        "max_completion_tokens": [0, -1, 1.5, "1", True, 10**30],
    }.items():
        for value in values:
            refused(post(**{field: value}), field)


# ---------------------------------------------------------------- S15

MANY = {
    "n": 10**9,
    "stop": ["x"] * 10_000,
    "stop_token_ids": [1] * 100_000,
    "logit_bias": {str(i): 1 for i in range(100_000)},
    "prompt_logprobs": 10**6,
    "metadata": {str(i): "x" for i in range(10_000)},
    "lora": [{"name": "a0"}] * 10_000,
    "chat_template_kwargs": {str(i): 1 for i in range(10_000)},
}


@pytest.mark.parametrize("field", [*MANY, "messages", "prompt", "logprobs", "parts", "longest stop"])
def test_s15_fanout_caps(server, post, field):
    """What would multiply work or memory is refused at once, before anything is made of it."""
    path, body = "/v1/chat/completions", {field: MANY.get(field)}
    if field == "messages":
        body = {"messages": [{"role": "user", "content": "x"}] * 10_000}
    elif field == "parts":
        field, body = "messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 10_000}]}
    elif field == "prompt":
        path, body = "/v1/completions", {"prompt": ["x"] * 500_000}
    elif field == "logprobs":
        path, body = "/v1/completions", {"logprobs": 10**6}
    elif field == "longest stop":
        field, body = "stop", {"stop": ["x" * 1_000_000]}
    process = psutil.Process()
    content = json.dumps({**ROUTES[path], **body}).encode()
    refused(post(path, content), field)
    before, started = process.memory_info().rss, time.process_time()
    for _ in range(3):
        refused(post(path, content), field)
    assert time.process_time() - started < 3 * 0.5
    assert process.memory_info().rss - before < (20 << 20) + len(content) * 10


WRONG_MANY_TIMES = [
    (DetokenizeRequest, {"tokens": [""] * 10_000}),
    (ChatRequest, {**CHAT, **{f"x{i}": 1 for i in range(10_000)}}),
    (ChatRequest, {**CHAT, "lora": [{f"x{i}": 1 for i in range(10_000)}]}),
    (ChatRequest, {**CHAT, "messages": [0] * 2000}),
    (TokenizeRequest, {"messages": [0] * 2000}),
    (ChatRequest, {**CHAT, "messages": [{"role": "user", "content": [0] * 200}] * 2000}),
    (ChatRequest, {**CHAT, "stop_token_ids": [""] * 1000}),
    (ChatRequest, {**CHAT, "logit_bias": {str(i): "" for i in range(10_000)}}),
    (ChatRequest, {**CHAT, "chat_template_kwargs": {str(i): [] for i in range(10_000)}}),
]


@pytest.mark.parametrize(("kind", "fields"), WRONG_MANY_TIMES)
def test_s15_one_error_of_many_is_made(kind, fields):
    """Each costs a kilobyte and some microseconds, in which nobody else is served."""
    with pytest.raises(ValidationError) as found:
        kind.model_validate(fields)
    assert found.value.error_count() <= 3


def test_s15_texts_that_can_not_fit(server, post):
    """A text far too long is not even cut into tokens."""
    for path, fields in (
        ("/v1/completions", {"prompt": "x" * 5_000_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 5_000_000}]}),
    ):
        error = refused(post(path, **fields), next(iter(fields)))
        assert error["code"] == "context_length_exceeded" and "characters" in error["message"]
    answer = post("/v1/completions", prompt=["x"] * 1000, n=8)
    assert answer.status_code == 400 and "max_num_queued_reqs" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "limit"),
    [
        ("/v1/completions", "max_tokens"),
        ("/v1/chat/completions", "max_tokens"),
        ("/v1/chat/completions", "max_completion_tokens"),
    ],
)
def test_a_limit_that_the_context_has_no_room_for(post, path, limit):
    base = {key: value for key, value in ROUTES[path].items() if key != "max_tokens"}
    error = refused(post(path, base=base, **{limit: 511}), limit)
    assert error["code"] == "context_length_exceeded" and "maximum context length is 512 tokens" in error["message"]
    prompt = post(path, base=base, **{limit: 1}).json()["usage"]["prompt_tokens"]
    usage = post(path, base=base, ignore_eos=True, **{limit: 512 - prompt}).json()["usage"]
    assert usage["total_tokens"] == 512


def test_a_text_without_a_limit_ends_where_the_context_does(post):
    answer = post("/v1/completions", base={"prompt": [5] * 500, "ignore_eos": True}).json()
    assert answer["usage"]["completion_tokens"] == 12


# ---------------------------------------------------------------- S16


def test_s16_ids_in_range(server, post):
    """Token ids that the vocabulary does not have are refused, and change nothing for those who run beside."""
    neighbour = {"prompt": "The neighbour", "max_tokens": 200, "logprobs": 1, "temperature": 0, "ignore_eos": True}
    alone = server.client.post("/v1/completions", json=neighbour).json()["choices"]
    with server.client.stream("POST", "/v1/completions", json={**neighbour, "stream": True}) as answer:
        lines = answer.iter_lines()
        events = [next(lines)]
        for field, value in (
            ("logit_bias", {"263": 100}),
            ("logit_bias", {str(1 << 31): 100}),
            ("stop_token_ids", [263]),
            ("prompt", [263]),
            ("prompt", [5, (1 << 31) + 5]),
        ):
            refused(post("/v1/completions", **{field: value}), field)
        events += lines
    chunks = [json.loads(line[6:])["choices"][0] for line in events if line.startswith("data: {")]
    assert "".join(chunk["text"] for chunk in chunks) == alone[0]["text"]
    found = [value for chunk in chunks for value in chunk["logprobs"]["token_logprobs"]]
    assert found == alone[0]["logprobs"]["token_logprobs"]


# ---------------------------------------------------------------- S26


def test_s26_errors_clean(server, post, shelf):
    """No path, no traceback, no address, nothing long of the request in any error."""
    rng = random.Random(1)
    marker = "MARK" + "x" * 3000
    answers = [
        server.client.get(f"/{marker}"),
        server.client.delete("/v1/models"),
        server.client.get(f"/v1/models/{marker}"),
        post(model=marker),
        post(stop=[marker]),
        post(messages=marker),
        post(messages=[{"role": marker, "content": marker}]),
        post(response_format={marker: marker}),
        post(chat_template_kwargs={"messages": marker[:100]}),
        post("/v1/completions", prompt=[marker, 1]),
        post("/v1/completions", content=b"{" + marker.encode()),
        server.client.post("/tokenize", json={"prompt": 5}),
        server.client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/etc"}),
        *(post(**{rng.choice([*CHAT, "tools", "seed"]): {marker: [marker]}}) for _ in range(20)),
    ]
    for answer in answers:
        assert 400 <= answer.status_code < 500, answer.text
        text = answer.text
        assert "Traceback" not in text and "0x" not in text and ".py" not in text and len(text) < 900
        assert str(shelf) not in text and "/home" not in text and "/tmp" not in text and "site-packages" not in text
        assert text.count("x" * 600) == 0


def test_s26_an_error_inside_is_logged_not_told(serve, caplog, monkeypatch):
    running = serve()
    server = running.app.state.server

    async def fail(*_):
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(server.names, "resolve", fail)
    answer = running.client.post("/v1/completions", json=TEXT)
    assert answer.status_code == 500 and "secret" not in answer.text
    identity = answer.headers["x-request-id"]
    assert identity in answer.json()["error"]["message"]
    assert any(identity in record.getMessage() and record.exc_info for record in caplog.records)
