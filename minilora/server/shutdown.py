"""The end of a server: what a signal, or the engine's death, leads to."""

import asyncio
from collections.abc import Callable

import uvicorn

from .state import Server

# Seconds between the engine's death and the server's end, so that /health can report it.
LAST_WORDS = 2.0
WATCH_SECONDS = 0.25


class Shutdown:
    """Ends a server in order. say: called with a line of text for the operator.

    The first signal lets nobody in any more, and running requests finish within `shutdown_timeout`; a second one ends
    them too. exit_code: 0 where all requests were finished, 1 where some were dropped or the engine had died.
    """

    def __init__(self, web: uvicorn.Server, server: Server, say: Callable[[str], None]):
        self._web, self._server, self._say = web, server, say
        self._drain: asyncio.Task[None] | None = None
        self._now = asyncio.Event()
        self.exit_code = 0

    def signal(self) -> None:
        """Take a signal, in the event loop's thread."""
        if self._drain is None:
            self._server.gate.drain()
            self._drain = asyncio.ensure_future(self._end())
        else:
            self._now.set()

    async def _end(self) -> None:
        gate, seconds = self._server.gate, self._server.config.shutdown_timeout
        if gate.active:
            self._say(f"ending: {gate.active} running texts have {seconds:g} seconds; a second signal ends them now")
        waits = [asyncio.ensure_future(gate.emptied()), asyncio.ensure_future(self._now.wait())]
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if gate.active:
            self._say(f"{gate.active} texts are dropped")
            self.exit_code = 1
        if (dead := self._server.engine.dead) is not None:
            self._say(f"error: {dead.cause}")
            self.exit_code = 1
        # Clients of what still runs are told so: their requests end with an error.
        await asyncio.to_thread(self._server.engine.close)
        self._leave()

    async def watch(self) -> None:
        """End the server when its engine dies, so that a supervisor starts it anew."""
        engine = self._server.engine
        while engine.dead is None:
            await asyncio.sleep(WATCH_SECONDS)
        if self._drain is None:
            self._say(f"error: {engine.dead.cause}")
            self.exit_code = 1
            self._server.gate.drain()
            await asyncio.sleep(LAST_WORDS)
            self._leave()

    def _leave(self) -> None:
        self._server.bodies.end()
        self._web.should_exit = True
