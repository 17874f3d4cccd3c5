"""POST /v1/chat/completions, with OpenAI's client, beside LLM's answers."""

import math

import openai
import pytest

from minilora import LoRARequest, SamplingParams
from minilora.chat import encode_chat

from .conftest import MODEL

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there — how are you?"}]
# Random weights make bytes that are no characters: many tokens complete none.
SEEDED = {"temperature": 0.8, "seed": 7}


@pytest.fixture(scope="module")
def create(server):
    """chat.completions.create of OpenAI's client."""
    with server.openai() as client:
        yield lambda **fields: client.chat.completions.create(**{"model": MODEL, "messages": MESSAGES, **fields})


@pytest.fixture
def say(llm):
    """A function: parameters -> LLM's RequestOutput."""

    def answer(adapter=None, messages=MESSAGES, **params):
        lora = adapter and LoRARequest(adapter)
        return llm.chat(messages, SamplingParams(**{"temperature": 0.0, "max_tokens": 12, **params}), lora)[0]

    return answer


def join(chunks):
    """What a stream's chunks make: {index: (text, finish_reason, logprobs, roles)}."""
    found = {}
    for chunk in chunks:
        assert chunk.object == "chat.completion.chunk"
        for choice in chunk.choices:
            text, reason, logprobs, roles = found.get(choice.index, ("", None, [], []))
            assert reason is None, "nothing follows the end"
            logprobs = logprobs + (choice.logprobs.content if choice.logprobs else [])
            roles = roles + ([choice.delta.role] if choice.delta.role else [])
            found[choice.index] = (text + (choice.delta.content or ""), choice.finish_reason, logprobs, roles)
    return found


def test_an_answer(create, say):
    answer, expected = create(max_completion_tokens=12), say()
    [choice] = answer.choices
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.model == MODEL
    assert choice.message.content == expected.outputs[0].text and choice.message.role == "assistant"
    assert choice.finish_reason == "length" and choice.logprobs is None and choice.message.refusal is None
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(expected.prompt_token_ids), 12)
    assert usage.total_tokens == usage.prompt_tokens + 12
    pages = (usage.prompt_tokens - 1) // 32
    assert pages > 0 and create(max_completion_tokens=1).usage.prompt_tokens_details.cached_tokens == 32 * pages


def test_a_stream(create, say):
    expected = say(n=3, max_tokens=60, **SEEDED)
    with create(max_completion_tokens=60, n=3, stream=True, **SEEDED) as stream:
        chunks = list(stream)
    found = join(chunks)
    assert {i: text for i, (text, *_) in found.items()} == {o.index: o.text for o in expected.outputs}
    assert all(reason == "length" and roles == ["assistant"] for _, reason, _, roles in found.values())
    assert all(chunk.usage is None for chunk in chunks) and len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 20


def test_usage_in_streams(create, say):
    prompt = len(say().prompt_token_ids)
    fields = {"max_completion_tokens": 9, "n": 2, "stream": True, **SEEDED}
    *chunks, last = create(**fields, stream_options={"include_usage": True})
    assert last.choices == [] and all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (
        prompt,
        18,
        prompt + 18,
    )
    both = {"include_usage": True, "continuous_usage_stats": True}
    counts = [chunk.usage.completion_tokens for chunk in create(**fields, stream_options=both)]
    assert counts == sorted(counts) and counts[-1] == 18 and counts[0] in (1, 2)


def test_sampling_fields_are_the_engines(create, say):
    """Each field does what SamplingParams' does, with and without a stream."""
    plain = say(max_tokens=30, **SEEDED).outputs[0].text
    for fields in (
        {"temperature": 1.3},
        {"top_p": 0.5},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 1.5},
        {"logit_bias": {65: -100, 66: 5.5}},
        {"seed": 8},
        {"stop": ["l", "e"]},
        {"extra": {"top_k": 3}},
        {"extra": {"min_p": 0.3}},
        {"extra": {"repetition_penalty": 1.6}},
        {"extra": {"stop_token_ids": [70, 71, 72, 80, 90, 100]}},
        {"extra": {"ignore_eos": True, "min_tokens": 20}},
        {"extra": {"stop": ["l", "e"], "include_stop_str_in_output": True}},
        {"extra": {"skip_special_tokens": False, "logit_bias": {"0": 100}}},
    ):
        fields = {**SEEDED, **fields}
        extra = fields.pop("extra", {})
        [expected] = say(**{"max_tokens": 30, **fields, **extra}).outputs
        sent = {**fields, "max_completion_tokens": 30, "extra_body": extra}
        if "logit_bias" in sent:
            sent["logit_bias"] = {str(key): value for key, value in sent["logit_bias"].items()}
        [choice] = create(**sent).choices
        found = (choice.message.content, choice.finish_reason, choice.stop_reason)
        assert found == (expected.text, expected.finish_reason, expected.stop_reason), fields
        assert join(create(**sent, stream=True))[0][:2] == found[:2], fields
        assert expected.text != plain or "ignore_eos" in extra, f"{fields} have no effect"


def test_logprobs(create, say, llm):
    expected = say(logprobs=3, max_tokens=10).outputs[0]
    for answer in (create(max_completion_tokens=10, logprobs=True, top_logprobs=3), None):
        content = (
            answer.choices[0].logprobs.content
            if answer
            else join(create(max_completion_tokens=10, logprobs=True, top_logprobs=3, stream=True))[0][2]
        )
        assert len(content) == 10
        for entry, token, at in zip(content, expected.token_ids, expected.logprobs, strict=True):
            assert entry.logprob == at[token].logprob and entry.token == at[token].decoded_token
            best = [entry.logprob for entry in entry.top_logprobs]
            assert len(best) == 3 and best == sorted(best, reverse=True) and math.isclose(best[0], entry.logprob)
    assert b"".join(bytes(e.bytes) for e in content).decode(errors="replace") == expected.text
    none = create(max_completion_tokens=4, logprobs=True, **SEEDED).choices[0].logprobs.content
    assert len(none) == 4 and all(entry.top_logprobs == [] for entry in none)


def test_the_end_of_text_is_in_no_logprobs(create, llm):
    """As in OpenAI's answers, tokens join to the text; a stop string's are its last."""
    ended = create(max_completion_tokens=5, logprobs=True, logit_bias={"2": 100})
    assert ended.choices[0].finish_reason == "stop" and ended.choices[0].logprobs.content == []
    assert ended.choices[0].message.content == "" and ended.usage.completion_tokens == 1
    stopped = create(max_completion_tokens=5, logprobs=True, logit_bias={str(llm.tokenizer.id_of("E")): 100}, stop="EE")
    assert len(stopped.choices[0].logprobs.content) == 2 and stopped.choices[0].message.content == ""


def test_logprobs_are_of_the_tokens_in_the_text(create, say):
    """A stop token's are there where the text has it."""
    token = say().outputs[0].token_ids[-1]
    for keep in (False, True):
        extra = {"stop_token_ids": [token], "include_stop_str_in_output": keep, "return_token_ids": True}
        [choice] = create(max_completion_tokens=12, temperature=0, logprobs=True, extra_body=extra).choices
        assert choice.stop_reason == token and len(choice.logprobs.content) == len(choice.token_ids) - (not keep)


def test_prompt_logprobs_and_token_ids(create, say):
    expected = say(prompt_logprobs=2, max_tokens=3)
    extra = {"prompt_logprobs": 2, "return_token_ids": True}
    answer = create(max_completion_tokens=3, extra_body=extra)
    assert answer.prompt_token_ids == expected.prompt_token_ids
    assert answer.choices[0].token_ids == expected.outputs[0].token_ids
    first, *chunks = create(max_completion_tokens=3, extra_body=extra, stream=True)
    assert first.prompt_token_ids == expected.prompt_token_ids
    assert [token for chunk in chunks for token in chunk.choices[0].token_ids] == expected.outputs[0].token_ids
    for found in (answer.prompt_logprobs, first.prompt_logprobs):
        assert found[0] is None and len(found) == len(expected.prompt_token_ids)
        for at, wanted in zip(found[1:], expected.prompt_logprobs[1:], strict=True):
            assert {int(token): entry["logprob"] for token, entry in at.items()} == {
                token: entry.logprob for token, entry in wanted.items()
            }


def test_messages(create, say, llm):
    """Parts are joined, developer is system, and what answers hold may be sent back."""
    expected = say().outputs[0].text
    parts = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]
    joined = [{"role": "system", "content": "Be\nbrief."}, MESSAGES[1]]
    assert (
        create(max_completion_tokens=12, messages=[{"role": "developer", "content": "Be brief."}, MESSAGES[1]])
        .choices[0]
        .message.content
        == expected
    )
    found = create(max_completion_tokens=12, messages=[{"role": "system", "content": parts}, MESSAGES[1]])
    assert found.choices[0].message.content == say(messages=joined).outputs[0].text
    back = [*MESSAGES, found.choices[0].message.model_dump(), {"role": "user", "content": "Go on.", "name": "Ann"}]
    answer = create(max_completion_tokens=2, messages=back)
    plain = [{"role": m["role"], "content": m["content"]} for m in back]
    assert answer.usage.prompt_tokens == len(encode_chat(llm.tokenizer, plain))
    bare = create(max_completion_tokens=2, extra_body={"add_generation_prompt": False})
    assert bare.usage.prompt_tokens == len(encode_chat(llm.tokenizer, MESSAGES, add_generation_prompt=False))


def test_without_a_limit_it_takes_what_fits(create, server):
    answer = create(extra_body={"ignore_eos": True})
    assert answer.usage.total_tokens == 512 and answer.choices[0].finish_reason == "length"


def test_fields_without_effect(create, say):
    """What official clients send for their service's sake, and what asks for nothing."""
    answer = create(
        max_completion_tokens=12,
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        safety_identifier="x",
        prompt_cache_key="y",
        response_format={"type": "text"},
        tools=[],
        tool_choice="none",
        modalities=["text"],
        extra_body={"functions": None, "guided_json": None, "best_of": 1, "early_stopping": False},
    )
    assert answer.choices[0].message.content == say().outputs[0].text


def test_errors_of_the_client(create, server):
    with pytest.raises(openai.NotFoundError) as caught:
        create(model="tinny")
    error = caught.value
    assert error.code == "model_not_found" and error.param == "model" and "Did you mean 'tiny'" in str(error)
    with pytest.raises(openai.BadRequestError) as caught:
        create(messages=[{"role": "user", "content": "x" * 600}])
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"
    with pytest.raises(openai.BadRequestError) as caught:
        create(stream=True, max_completion_tokens=0)
    assert caught.value.param == "max_completion_tokens"


@pytest.mark.anyio
async def test_the_async_client(server, say):
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    async with client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_completion_tokens=12, temperature=0, stream=True
        )
        chunks = [chunk async for chunk in stream]
    assert join(chunks)[0][0] == say().outputs[0].text


@pytest.fixture
def anyio_backend():
    return "asyncio"
