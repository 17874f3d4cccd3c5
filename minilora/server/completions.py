"""POST /v1/completions."""

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..outputs import CompletionOutput, RequestOutput
from . import logprobs
from .answers import FAILURES, Completion
from .chat import FINGERPRINT
from .generation import Job, Tally, make_job
from .protocol import CompletionRequest
from .sampling import for_completion
from .state import Server, ServerDep
from .stream import event

router = APIRouter()


@router.post("/v1/completions", response_model=Completion, responses=FAILURES)
async def create_completion(body: CompletionRequest, request: Request, server: ServerDep) -> Response:
    """Continue texts."""
    params = for_completion(body, server.engine.model)
    job = await make_job(server, request, body, params, "prompt", lambda: _encode(server, body), len(body.prompt))
    if body.stream:
        return job.streamed(_events(job, body))
    return await job.answered(request, lambda outputs: _answer(job, body, outputs))


def _encode(server: Server, body: CompletionRequest) -> list[list[int]]:
    special, encode = body.add_special_tokens is not False, server.engine.tokenizer.encode
    server.check_length(max(map(len, body.prompt)), "prompt")
    return [encode(prompt, special) if isinstance(prompt, str) else prompt for prompt in body.prompt]


def _head(job: Job) -> dict[str, Any]:
    return {
        "id": f"cmpl-{job.id}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": job.model,
        "system_fingerprint": FINGERPRINT,
    }


class _Prompt:
    """What all texts of a prompt share, and which may be long: made once, in a thread.

    echo: the text that they begin with; echoed: its log-probabilities, None where they are not wanted; logprobs:
    vLLM's prompt_logprobs.
    """

    def __init__(self, job: Job, body: CompletionRequest, index: int, output: RequestOutput):
        tokenizer, given, found = job.server.engine.tokenizer, body.prompt[index], output.prompt_logprobs
        self.tokens = output.prompt_token_ids
        self.echo, self.echoed = "", None
        if body.echo:
            text = tokenizer.decode(self.tokens, False)
            self.echo = given if isinstance(given, str) else text
            if body.logprobs is not None:
                # The tokenizer may have put special tokens before what was given.
                before = len(self.echo) - len(text)
                self.echoed = logprobs.TextLogprobs(tokenizer, before, False).add(self.tokens, found or [])
        self.logprobs = None if body.prompt_logprobs is None else logprobs.for_prompt(found)


class _Choice:
    """One text of one prompt, as it grows or whole. number: its index among all texts of the request."""

    def __init__(self, job: Job, body: CompletionRequest, number: int, prompt: _Prompt):
        self._body, self._number, self._prompt = body, number, prompt
        # max_tokens 0 is done with one token, which is dropped.
        self._empty = body.max_tokens == 0
        self._first = True
        self._logprobs = logprobs.TextLogprobs(
            job.server.engine.tokenizer, len(prompt.echo), job.params.skip_special_tokens
        )

    def add(self, text: CompletionOutput) -> dict[str, Any] | None:
        """The choice with what is new of it; None where nothing is."""
        if self._empty:
            text = replace(text, text="", token_ids=[], logprobs=[] if text.logprobs is not None else None)
            text.finish_reason = text.finish_reason and "length"
        first, self._first = self._first, False
        body, prompt = self._body, self._prompt
        shown = (prompt.echo if first else "") + text.text
        if not (first or shown or text.finish_reason or text.logprobs or body.return_token_ids):
            return None
        choice = {
            "index": self._number,
            "text": shown,
            "logprobs": self._logprobs_of(text, first),
            "finish_reason": text.finish_reason,
            "stop_reason": text.stop_reason,
        }
        if body.prompt_logprobs is not None and first:
            choice["prompt_logprobs"] = prompt.logprobs
        if body.return_token_ids:
            choice |= {"token_ids": text.token_ids, "prompt_token_ids": prompt.tokens if first else None}
        return choice

    def _logprobs_of(self, text: CompletionOutput, first: bool) -> dict[str, Any] | None:
        if text.logprobs is None:
            return None
        count = 0 if self._empty else logprobs.in_text(text, bool(self._body.include_stop_str_in_output))
        new = self._logprobs.add(text.token_ids[:count], text.logprobs[:count])
        echoed = self._prompt.echoed if first else None
        return new if echoed is None else {name: echoed[name] + new[name] for name in new}


def _answer(job: Job, body: CompletionRequest, outputs: list[RequestOutput]) -> dict[str, Any]:
    tally, choices = Tally(generates=body.max_tokens != 0), []
    for index, output in enumerate(outputs):
        tally.add(index, output)
        prompt = _Prompt(job, body, index, output)
        for text in output.outputs:
            choices.append(_Choice(job, body, index * job.params.n + text.index, prompt).add(text))
    return {**_head(job), "choices": choices, "usage": tally.usage()}


async def _events(job: Job, body: CompletionRequest) -> AsyncGenerator[bytes, None]:
    """Chunks with new text of one choice each; at the end the usage, where it is asked for."""
    head, tally = _head(job), Tally(generates=body.max_tokens != 0)
    prompts: dict[int, _Prompt] = {}
    choices: dict[int, _Choice] = {}
    async for index, delta in job.deltas():
        tally.add(index, delta)
        usage = tally.of_chunk(body)
        for text in delta.outputs:
            number = index * job.params.n + text.index
            if index not in prompts:
                prompts[index] = await asyncio.to_thread(_Prompt, job, body, index, delta)
            if number not in choices:
                choices[number] = _Choice(job, body, number, prompts[index])
            if choice := choices[number].add(text):
                yield event({**head, "choices": [choice], **usage})
    if body.usage_at_end:
        yield event({**head, "choices": [], "usage": tally.usage()})
