"""POST /v1/completions, /tokenize and /detokenize, beside LLM's answers."""

import json
import threading

import openai
import pytest

from minilora import SamplingParams
from minilora.server import logprobs

from .conftest import MODEL

PROMPT = "Once upon a time, in a land far, far away, there lived"


@pytest.fixture(scope="module")
def create(server):
    with server.openai() as client:
        yield lambda **fields: client.completions.create(**{"model": MODEL, "prompt": PROMPT, **fields})


@pytest.fixture
def complete(llm):
    def run(prompts=PROMPT, **params):
        return llm.generate(prompts, SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **params}))

    return run


def join(chunks):
    texts = {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
    return texts


def test_a_text(create, complete):
    answer, [expected] = create(max_tokens=8), complete()
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert answer.choices[0].text == expected.outputs[0].text and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert create().usage.completion_tokens == 16, "OpenAI's default"


def test_prompts_in_all_forms(create, complete, llm):
    ids = [llm.tokenizer.encode(text) for text in (PROMPT, "And then")]
    expected = [
        [o.text for o in output.outputs] for output in complete([PROMPT, "And then"], n=2, temperature=0.7, seed=3)
    ]
    flat = dict(enumerate(expected[0] + expected[1]))
    fields = {"n": 2, "temperature": 0.7, "seed": 3, "max_tokens": 8}
    for prompt, wanted in (
        (PROMPT, {0: flat[0], 1: flat[1]}),
        (ids[1], {0: flat[2], 1: flat[3]}),
        ([PROMPT, "And then"], flat),
        (ids, flat),
    ):
        answer = create(prompt=prompt, **fields)
        assert {choice.index: choice.text for choice in answer.choices} == wanted
        assert join(create(prompt=prompt, stream=True, **fields)) == wanted
    assert answer.usage.prompt_tokens == len(ids[0]) + len(ids[1]) and answer.usage.completion_tokens == 32
    *_, last = create(prompt=ids, stream=True, stream_options={"include_usage": True}, **fields)
    assert last.usage.completion_tokens == 32 and last.usage.prompt_tokens == answer.usage.prompt_tokens


def test_logprobs(create, complete):
    expected = complete(logprobs=2)[0].outputs[0]
    found = create(max_tokens=8, logprobs=2).choices[0].logprobs
    assert found.token_logprobs == [at[t].logprob for at, t in zip(expected.logprobs, expected.token_ids, strict=True)]
    shown = [at[t].decoded_token for at, t in zip(expected.logprobs, expected.token_ids, strict=True)]
    assert all(
        a == b or (b == "\ufffd" and a.startswith("bytes:\\x")) for a, b in zip(found.tokens, shown, strict=True)
    )
    assert all(len(at) == 2 for at in found.top_logprobs)
    assert found.text_offset[0] == 0 and found.text_offset == sorted(found.text_offset)
    parts = [chunk.choices[0].logprobs for chunk in create(max_tokens=8, logprobs=2, stream=True)]
    assert [value for part in parts for value in part.token_logprobs] == found.token_logprobs
    assert [value for part in parts for value in part.text_offset] == found.text_offset


@pytest.mark.parametrize("limit", [0, 5])
def test_echo(create, complete, llm, limit):
    [expected] = complete(max_tokens=limit or 1, logprobs=1, prompt_logprobs=1)
    ids, text = expected.prompt_token_ids, expected.outputs[0].text if limit else ""
    for prompt in (PROMPT, ids):
        answer = create(prompt=prompt, max_tokens=limit, echo=True, logprobs=1)
        [choice] = answer.choices
        assert choice.text == PROMPT + text and answer.usage.completion_tokens == limit
        assert choice.finish_reason == "length"
        wanted = [None] + [at[t].logprob for at, t in zip(expected.prompt_logprobs[1:], ids[1:], strict=True)]
        generated = expected.outputs[0]
        wanted += [at[t].logprob for at, t in zip(generated.logprobs, generated.token_ids, strict=True)] * bool(limit)
        assert choice.logprobs.token_logprobs == wanted and choice.logprobs.top_logprobs[0] is None
        assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == len(ids) + limit
        chunks = list(create(prompt=prompt, max_tokens=limit, echo=True, logprobs=1, stream=True))
        assert join(chunks)[0] == PROMPT + text
        assert [value for c in chunks for value in c.choices[0].logprobs.token_logprobs] == wanted
    assert create(max_tokens=limit, echo=True).choices[0].text == PROMPT + text


def test_text_offset_is_where_a_token_begins(create):
    """A part of a character begins where the character does."""
    text = "I 💖🦙 you and 你好𓀀 <|im_end|> ok"
    [choice] = create(prompt=text, max_tokens=0, echo=True, logprobs=0).choices
    found = list(zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True))
    assert all(token.startswith("bytes:") or text.startswith(token, offset) for offset, token in found)
    assert len(found) > len(dict(found)) and found[-1] == (len(text) - 1, "k")


def test_tokens_before_the_text_begin_with_it(llm):
    ids = llm.tokenizer.encode("<|endoftext|>Hi")
    found = logprobs.TextLogprobs(llm.tokenizer, -len("<|endoftext|>"), False).add(ids, [None] * 3)
    assert found["text_offset"] == [0, 0, 1]


def test_the_prefix_cache_shows(create):
    ids = list(range(10, 150))
    first = create(prompt=ids, max_tokens=1)
    again = create(prompt=ids, max_tokens=1)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens == 128
    assert again.choices[0].text == first.choices[0].text


def test_one_wrong_prompt_fails_all(create, server):
    for wrong in ([[1, 2], [1, 99999]], [[1, 2], [3] * 600]):
        with pytest.raises(openai.BadRequestError) as caught:
            create(prompt=wrong)
        assert caught.value.param == "prompt"


def test_tokenize_and_back(server, llm):
    client = server.client
    text = "Hello <|im_end|> wörld"
    found = client.post("/tokenize", json={"model": MODEL, "prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == llm.tokenizer.encode(text) and found["count"] == len(found["tokens"])
    assert found["max_model_len"] == 512 and len(found["token_strs"]) == found["count"]
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    messages = [{"role": "user", "content": "Hi <|im_end|>"}]
    chat = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    answer = client.post(
        "/v1/chat/completions", json={"messages": messages, "max_tokens": 1, "return_token_ids": True}
    ).json()
    assert answer["prompt_token_ids"] == chat
    for body in ({}, {"prompt": "x", "messages": messages}, {"prompt": "x", "model": "other"}):
        assert client.post("/tokenize", json=body).status_code in (400, 404)
    for body, param in (
        ({"messages": messages, "add_special_tokens": True}, "add_special_tokens"),
        ({"prompt": "x", "add_generation_prompt": False}, "add_generation_prompt"),
        ({"prompt": "x", "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ({"prompt": "half a pair \ud800"}, "prompt"),
    ):
        answer = client.post("/tokenize", content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param
    assert client.post("/detokenize", json={"tokens": [263]}).json()["error"]["param"] == "tokens"


@pytest.fixture
def token_threads(server, monkeypatch):
    """The names of the threads that made texts of tokens; the event loop's is "web"."""
    names, token = set(), server.engine.tokenizer.token

    def noted(token_id):
        names.add(threading.current_thread().name)
        return token(token_id)

    monkeypatch.setattr(server.engine.tokenizer, "token", noted)
    return names


def test_others_are_served_while_tokens_are_shown(server, token_threads):
    server.client.post("/tokenize", json={"prompt": PROMPT, "return_token_strs": True}).raise_for_status()
    assert token_threads and "web" not in token_threads


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_logprobs_are_made_once_while_others_are_served(server, monkeypatch, stream):
    """They are the same for each text; of a long prompt they are a hundred thousand numbers."""
    threads, for_prompt = [], logprobs.for_prompt

    def noted(found):
        threads.append(threading.current_thread().name)
        return for_prompt(found)

    monkeypatch.setattr(logprobs, "for_prompt", noted)
    body = {"prompt": PROMPT, "prompt_logprobs": 2, "n": 3, "max_tokens": 2, "stream": stream}
    assert server.client.post("/v1/completions", json=body).text.count('"prompt_logprobs"') == 3
    assert len(threads) == 1 and threads != ["web"]


def test_token_bytes(llm):
    """The bytes of tokens, of parts of characters too, join to the text's."""
    text = "naïve 東京 🙂 <|im_end|>"
    assert b"".join(map(llm.tokenizer.token_bytes, llm.tokenizer.encode(text))) == text.encode()
