"""POST /v1/completions."""

import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..outputs import CompletionOutput, LogprobsAt, RequestOutput
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


class _Choice:
    """One text of one prompt, as it grows or whole. number: its index among all texts of the request."""

    def __init__(self, job: Job, body: CompletionRequest, number: int, output: RequestOutput):
        self._body, self._number, self._prompt = body, number, output.prompt_token_ids
        self._tokenizer = job.server.engine.tokenizer
        # Max_tokens 0 is done with one token, which is dropped.
        self._empty = body.max_tokens == 0
        self._echo = self._echoed(job, output) if body.echo else ""
        self._first = True
        self._logprobs = logprobs.TextLogprobs(self._tokenizer)

    def _echoed(self, job: Job, output: RequestOutput) -> str:
        given = self._body.prompt[self._number // job.params.n]
        return given if isinstance(given, str) else self._tokenizer.decode(output.prompt_token_ids, False)

    def add(self, output: RequestOutput, text: CompletionOutput) -> dict[str, Any] | None:
        """The choice with what is new of it; None where nothing is."""
        if self._empty:
            text = replace(text, text="", token_ids=[], logprobs=[] if text.logprobs is not None else None)
            text.finish_reason = text.finish_reason and "length"
        first, self._first = self._first, False
        body, shown = self._body, (self._echo if first else "") + text.text
        if not (first or shown or text.finish_reason or text.logprobs or body.return_token_ids):
            return None
        choice = {
            "index": self._number,
            "text": shown,
            "logprobs": self._logprobs_of(output, text, first),
            "finish_reason": text.finish_reason,
            "stop_reason": text.stop_reason,
        }
        if body.prompt_logprobs is not None and first:
            choice["prompt_logprobs"] = logprobs.for_prompt(output.prompt_logprobs)
        if body.return_token_ids:
            choice |= {"token_ids": text.token_ids, "prompt_token_ids": self._prompt if first else None}
        return choice

    def _logprobs_of(self, output: RequestOutput, text: CompletionOutput, first: bool) -> dict[str, Any] | None:
        if text.logprobs is None:
            return None
        count = 0 if self._empty else logprobs.in_text(text)
        tokens, found = text.token_ids[:count], list[LogprobsAt | None](text.logprobs[:count])
        if self._body.echo and first:
            tokens, found = [*self._prompt, *tokens], [*(output.prompt_logprobs or []), *found]
        return self._logprobs.add(tokens, found)


def _answer(job: Job, body: CompletionRequest, outputs: list[RequestOutput]) -> dict[str, Any]:
    tally, choices = Tally(generates=body.max_tokens != 0), []
    for prompt, output in enumerate(outputs):
        tally.add(prompt, output)
        for text in output.outputs:
            choices.append(_Choice(job, body, prompt * job.params.n + text.index, output).add(output, text))
    return {**_head(job), "choices": choices, "usage": tally.usage()}


async def _events(job: Job, body: CompletionRequest) -> AsyncGenerator[bytes, None]:
    """Chunks with new text of one choice each; at the end the usage, for who asks for it."""
    head, tally = _head(job), Tally(generates=body.max_tokens != 0)
    choices: dict[int, _Choice] = {}
    async for prompt, delta in job.deltas():
        tally.add(prompt, delta)
        usage = tally.of_chunk(body)
        for text in delta.outputs:
            number = prompt * job.params.n + text.index
            if number not in choices:
                choices[number] = _Choice(job, body, number, delta)
            if choice := choices[number].add(delta, text):
                yield event({**head, "choices": [choice], **usage})
    if body.usage_at_end:
        yield event({**head, "choices": [], "usage": tally.usage()})
