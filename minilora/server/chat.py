"""POST /v1/chat/completions."""

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from .. import __version__
from ..chat import encode_chat
from ..outputs import CompletionOutput, RequestOutput
from ..tokenizer import Tokenizer
from . import logprobs
from .answers import FAILURES, ChatCompletion
from .generation import Job, Tally, make_job
from .protocol import ChatMessage, ChatRequest, ChatTemplateOptions
from .sampling import for_chat
from .state import Server, ServerDep
from .stream import event

router = APIRouter()

FINGERPRINT = f"minilora-{__version__}"


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=FAILURES)
async def create_chat_completion(body: ChatRequest, request: Request, server: ServerDep) -> Response:
    """Answer a conversation."""
    params = for_chat(body, server.engine.model)
    job = await make_job(server, request, body, params, "messages", lambda: [encode(server, body.messages, body)])
    if body.stream:
        return job.streamed(_events(job, body))
    return await job.answered(request, lambda outputs: _answer(job, body, outputs[0]))


def encode(server: Server, messages: list[ChatMessage], options: ChatTemplateOptions) -> list[int]:
    """The tokens of a conversation. Raises UsageError."""
    given, variables = [message.for_template() for message in messages], options.chat_template_kwargs
    server.check_length(sum(len(message["content"]) for message in given), "messages")
    return encode_chat(server.engine.tokenizer, given, options.add_generation_prompt is not False, variables)


def _head(job: Job, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{job.id}",
        "object": kind,
        "created": int(time.time()),
        "model": job.model,
        "system_fingerprint": FINGERPRINT,
    }


def _answer(job: Job, body: ChatRequest, output: RequestOutput) -> dict[str, Any]:
    tally, tokenizer = Tally(), job.server.engine.tokenizer
    tally.add(0, output)
    choices = []
    for text in output.outputs:
        message = {"role": "assistant", "content": text.text, "refusal": None}
        choices.append({"index": text.index, "message": message, **_ending(text, body, tokenizer)})
    answer = {**_head(job, "chat.completion"), "choices": choices, "usage": tally.usage()}
    return answer | _prompt_extras(body, output)


def _ending(text: CompletionOutput, body: ChatRequest, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a choice and a chunk of one say beside the text."""
    extras = {"token_ids": text.token_ids} if body.return_token_ids else {}
    top, keep_stop = body.top_logprobs or 0, bool(body.include_stop_str_in_output)
    return {
        "logprobs": logprobs.for_chat(text, top, keep_stop, tokenizer),
        "finish_reason": text.finish_reason,
        "stop_reason": text.stop_reason,
        **extras,
    }


def _prompt_extras(body: ChatRequest, output: RequestOutput) -> dict[str, Any]:
    """vLLM's fields about the prompt, where they are asked for."""
    found: dict[str, Any] = {}
    if body.prompt_logprobs is not None:
        found["prompt_logprobs"] = logprobs.for_prompt(output.prompt_logprobs)
    if body.return_token_ids:
        found["prompt_token_ids"] = output.prompt_token_ids
    return found


async def _events(job: Job, body: ChatRequest) -> AsyncGenerator[bytes, None]:
    """Chunks: for each choice the role, then its texts; at the end the usage, where it is asked for."""
    head, tally, begun = _head(job, "chat.completion.chunk"), Tally(), set[int]()
    tokenizer = job.server.engine.tokenizer
    async for _, delta in job.deltas():
        tally.add(0, delta)
        usage = tally.of_chunk(body)
        extras = {} if begun else await asyncio.to_thread(_prompt_extras, body, delta)
        for text in delta.outputs:
            data = b""
            if text.index not in begun:
                begun.add(text.index)
                role = {"role": "assistant", "content": ""}
                choice = {"index": text.index, "delta": role, "logprobs": None, "finish_reason": None}
                data, extras = event({**head, "choices": [choice], **usage, **extras}), {}
            # Nothing is sent of a text that is held back because its last character is not complete, or may begin a
            # stop string.
            if text.text or text.finish_reason or text.logprobs or body.return_token_ids:
                content = {"content": text.text} if text.text else {}
                choice = {"index": text.index, "delta": content, **_ending(text, body, tokenizer)}
                data += event({**head, "choices": [choice], **usage})
            if data:
                yield data
    if body.usage_at_end:
        yield event({**head, "choices": [], "usage": tally.usage()})
