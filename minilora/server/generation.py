"""What both generation routes do: admit a request, make its tokens, run it, and count what it used."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request
from starlette.responses import Response

from ..outputs import LoRARequest, RequestOutput
from ..params import SamplingParams
from .failures import ApiError, about
from .protocol import Sampling
from .state import Server
from .stream import CLIENT_LEFT, EventStream, attended, document

Tokens = list[int]


class Tally:
    """Counts the tokens of a request's prompts and texts, from whole outputs or from deltas.

    generates: whether the texts' tokens count; false where only the prompt is wanted back.
    """

    def __init__(self, generates: bool = True) -> None:
        self._generates = generates
        self._prompts: dict[int, tuple[int, int]] = {}
        self._generated = 0

    def add(self, index: int, output: RequestOutput) -> None:
        """Count an output of the prompt with this index."""
        self._prompts[index] = (len(output.prompt_token_ids), output.num_cached_tokens)
        if self._generates:
            self._generated += sum(len(text.token_ids) for text in output.outputs)

    def of_chunk(self, body: Sampling) -> dict[str, Any]:
        """A chunk's field for the usage: so far, null before the last one, or none, as the request wants it."""
        if body.usage_in_chunks:
            return {"usage": self.usage()}
        return {"usage": None} if body.usage_at_end else {}

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage."""
        prompt = sum(tokens for tokens, _ in self._prompts.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._generated,
            "total_tokens": prompt + self._generated,
            "prompt_tokens_details": {"cached_tokens": sum(cached for _, cached in self._prompts.values())},
        }


@dataclass(frozen=True)
class Job:
    """A request that can run.

    model: the name for the answer; id: of the request, for the answer, may be the client's choice; log_id: our own;
    param: the field that holds its prompts; encode: makes their tokens, in a thread; prompts: how many there are;
    limit: the field that says how many tokens a text may have, and what it says, None for nothing; order: what
    AsyncEngine.generate takes beside the prompt.
    """

    server: Server
    model: str
    id: str
    log_id: str
    param: str
    encode: Callable[[], list[Tokens]]
    prompts: int
    limit: tuple[str, int | None]
    params: SamplingParams
    loras: tuple[LoRARequest, ...]
    key: str
    order: dict[str, Any]

    def streamed(self, events: AsyncGenerator[bytes, None]) -> EventStream:
        """Its events as an answer."""
        config = self.server.config
        return EventStream(events, self.log_id, config.request_timeout, config.sse_ping_seconds)

    async def answered(self, request: Request, answer: Callable[[list[RequestOutput]], dict[str, Any]]) -> Response:
        """The answer made of all outputs, unless its client leaves, which ends it."""
        outputs = await attended(request.receive, self.whole(), self.server.config.request_timeout)
        if outputs is None:
            return Response(status_code=CLIENT_LEFT)
        # With log-probabilities it may be of millions of numbers.
        return await asyncio.to_thread(lambda: document(answer(outputs)))

    async def whole(self) -> list[RequestOutput]:
        """The outputs of all prompts. Leaving early ends them."""
        async with self._admitted():
            works = [asyncio.ensure_future(self._complete(tokens)) for tokens in await self._tokens()]
            try:
                return await asyncio.gather(*works)
            finally:
                for work in works:
                    work.cancel()

    async def deltas(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """(index of the prompt, what is new of its texts), as it comes. Leaving early ends all of them."""
        async with self._admitted():
            streams = [self._generate(tokens) for tokens in await self._tokens()]
            async with aclosing(_merge(streams)) as merged:
                async for index, delta in merged:
                    yield index, delta

    def _admitted(self) -> AbstractAsyncContextManager[None]:
        return self.server.gate.admit(self.key, self.prompts * self.params.n)

    async def _tokens(self) -> list[Tokens]:
        with about(self.param):
            prompts = await asyncio.to_thread(self.encode)
        longest, (name, limit) = max(map(len, prompts)), self.limit
        self.server.check_tokens(longest, self.param)
        if limit is not None:
            self.server.check_limit(longest, limit, name)
        return prompts

    def _arguments(self, tokens: Tokens) -> tuple[Any, ...]:
        params = self.params
        if params.max_tokens is None:
            params = replace(params, max_tokens=max(1, self.server.longest - len(tokens)))
        return {"prompt_token_ids": tokens}, params, self.loras

    async def _complete(self, tokens: Tokens) -> RequestOutput:
        with about(self.param):
            return await self.server.engine.complete(*self._arguments(tokens), **self.order)

    async def _generate(self, tokens: Tokens) -> AsyncGenerator[RequestOutput, None]:
        with about(self.param):
            async with aclosing(self.server.engine.generate(*self._arguments(tokens), **self.order)) as stream:
                async for delta in stream:
                    yield delta


async def make_job(
    server: Server,
    request: Request,
    body: Sampling,
    params: SamplingParams,
    param: str,
    encode: Callable[[], list[Tokens]],
    prompts: int = 1,
) -> Job:
    """A job for a request's body. Raises NotFoundError for an unknown model, UsageError or ApiError for what
    this request may not ask."""
    state, config = request.scope["state"], server.config
    key, admin = state["key"], state["admin"]
    priority = body.priority or 0
    if priority < 0 and (config.api_keys or config.admin_keys) and not admin:
        raise ApiError(403, "a priority below 0 needs an admin key", "priority", "permission_denied")
    chosen = await server.names.resolve(
        body.model, [(use.name, 1.0 if use.scale is None else use.scale) for use in body.lora or ()]
    )
    log_id = state["request_id"]
    identity = body.request_id or log_id
    order: dict[str, Any] = {
        "request_id": identity,
        "priority": priority,
        "tenant": key if len(config.api_keys) > 1 else None,
        "salt": _salt(key if config.isolate_cache_per_key else "", body.cache_salt),
        "start_within": config.queue_timeout,
        # Its later prompts may well wait for its first ones.
        "together": [],
    }
    return Job(
        server=server,
        model=chosen.name,
        id=identity,
        log_id=log_id,
        param=param,
        encode=encode,
        prompts=prompts,
        limit=body.limit,
        params=params,
        loras=chosen.loras,
        key=key,
        order=order,
    )


def _salt(key: str, salt: str | None) -> bytes:
    return json.dumps([key, salt]).encode() if key or salt else b""


async def _merge(
    streams: Sequence[AsyncGenerator[RequestOutput, None]],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """The items of several streams as they come, each with its stream's index; the first error ends all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for delta in only:
                yield 0, delta
        return
    news: asyncio.Queue[tuple[int, RequestOutput | BaseException | None]] = asyncio.Queue()

    async def forward(index: int, stream: AsyncGenerator[RequestOutput, None]) -> None:
        try:
            async with aclosing(stream):
                async for delta in stream:
                    news.put_nowait((index, delta))
            news.put_nowait((index, None))
        except Exception as error:
            news.put_nowait((index, error))

    tasks = [asyncio.ensure_future(forward(i, stream)) for i, stream in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            index, item = await news.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
