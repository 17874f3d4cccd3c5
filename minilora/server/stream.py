"""Answers and how they are sent: as one document or as server-sent events; work that ends when its client leaves.

JSON is written by pydantic, several times as fast as by json, which lets no other client be served meanwhile.
"""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .failures import ApiError, failure_of

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
PING = b": still working\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
# The status that web servers log for a client that left; nobody receives it.
CLIENT_LEFT = 499


def event(content: dict[str, Any]) -> bytes:
    """A server-sent event. It is ASCII: some clients take U+2028 and its like for ends of lines."""
    return b"data: " + to_json(content, ensure_ascii=True) + b"\n\n"


def document(content: dict[str, Any]) -> Response:
    """An answer in one piece. Made in a thread where it is long."""
    return Response(to_json(content), media_type="application/json")


async def attended(receive: Receive, work: Coroutine[Any, Any, T], seconds: float) -> T | None:
    """The result of a request's work; None if the client left, which cancels it. Raises ApiError after `seconds`."""
    tasks: list[asyncio.Task[Any]] = [asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        if tasks[1].done():
            return None
        cause = f"the request took longer than {seconds:g} seconds, this server's request_timeout"
        raise ApiError(504, cause, None, "request_timeout")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come.

    The status waits for the first event, or for the first sign of life if that comes earlier: what fails before has
    its own status, what fails later is an event with the error. While nothing comes, a comment every `ping` seconds
    keeps proxies and clients from giving up.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], request_id: str, seconds: float, ping: float):
        super().__init__(None, 200, HEADERS, "text/event-stream")
        del self.headers["content-length"]
        self._events, self._id, self._seconds, self._ping = events, request_id, seconds, ping
        self._begun = self._lively = self._ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all of it, or as much as the client stays for. Raises what fails before the first event."""
        pings = asyncio.ensure_future(self._ping_regularly(send))
        try:
            await attended(receive, self._send_events(send), self._seconds)
        except Exception as error:
            if not self._begun:
                raise
            await self._end(send, event(failure_of(error, self._id).body) + DONE)
        finally:
            pings.cancel()

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for data in events:
                await self._send(send, data)
                self._lively = True
        await self._end(send, DONE)

    async def _ping_regularly(self, send: Send) -> None:
        while True:
            self._lively = False
            await asyncio.sleep(self._ping)
            if not self._lively:
                await self._send(send, PING)

    async def _end(self, send: Send, data: bytes) -> None:
        self._ended = True
        await self._begin(send)
        await send({"type": "http.response.body", "body": data})

    async def _send(self, send: Send, data: bytes) -> None:
        if not self._ended:
            await self._begin(send)
            await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _begin(self, send: Send) -> None:
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
