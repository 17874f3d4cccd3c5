"""How many texts may be in the engine at once: a request with n has n of them.

The engine queues and schedules by itself; the gate bounds what it holds, so that an overloaded server says at once
that it is, instead of letting everybody wait in vain.
"""

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from ..async_engine import AsyncEngine
from ..errors import UsageError
from .failures import ApiError, draining
from .settings import ServerConfig

# Why requests are refused, as the metrics name it.
REASONS = ("queue_full", "key_limit", "draining")
# Endings from which the rate is measured, and bounds of what clients are told to wait, in seconds.
REMEMBERED = 64
SHORTEST_WAIT, LONGEST_WAIT = 1, 60


class Gate:
    """Lets requests in, up to max_num_seqs texts that run and max_num_queued_reqs that wait. For one event loop.

    active: texts of all requests inside; rejections: how many were refused, by REASONS.
    """

    def __init__(self, config: ServerConfig, engine: AsyncEngine):
        self._running = engine.config.max_num_seqs
        self.capacity = self._running + config.max_num_queued_reqs
        self._per_key = config.max_queued_per_key
        self.active = 0
        self.draining = False
        self.rejections = Counter(dict.fromkeys(REASONS, 0))
        self._by_key: Counter[str] = Counter()
        self._ended: deque[tuple[float, int]] = deque(maxlen=REMEMBERED)
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def waiting(self) -> int:
        """Texts inside that can't all run at once."""
        return max(0, self.active - self._running)

    @asynccontextmanager
    async def admit(self, key: str, sequences: int) -> AsyncIterator[None]:
        """Be inside with this many texts, all or none. key: whose limit counts, "" for nobody's.

        Raises ApiError at once where the server is full or shutting down, UsageError where it could never let them in.
        """
        self._check(key, sequences)
        self._change(key, sequences)
        try:
            yield
        finally:
            self._change(key, -sequences)
            self._ended.append((time.monotonic(), sequences))

    def _check(self, key: str, sequences: int) -> None:
        most = self.capacity if self._per_key is None or not key else min(self.capacity, self._per_key)
        if sequences > most:
            limit = "max_queued_per_key" if most < self.capacity else "max_num_seqs and max_num_queued_reqs together"
            raise UsageError(f"the request makes {sequences} texts, more than {limit}, {most}", "Split it.")
        if self.draining:
            self.rejections["draining"] += 1
            raise draining()
        if key and self._per_key is not None and self._by_key[key] + sequences > self._per_key:
            cause = f"this API key has {self._by_key[key]} texts running or waiting, of {self._per_key} allowed"
            raise self._refusal(429, "key_limit", cause, sequences)
        if self.active + sequences > self.capacity:
            raise self._refusal(503, "queue_full", "the server is full", sequences)

    def _refusal(self, status: int, reason: str, cause: str, sequences: int) -> ApiError:
        self.rejections[reason] += 1
        wait = self.retry_after(sequences)
        return ApiError(status, f"{cause}; try again in {wait} seconds", None, reason, wait)

    def _change(self, key: str, sequences: int) -> None:
        self.active += sequences
        if key:
            self._by_key[key] += sequences
            if not self._by_key[key]:
                del self._by_key[key]
        if self.active:
            self._empty.clear()
        else:
            self._empty.set()

    def retry_after(self, sequences: int = 1) -> int:
        """Whole seconds after which as many texts will probably find a place.

        That is when those that wait now have begun, at the rate of the last endings: one who comes back when the
        first place is free would meet all the others who were sent away.
        """
        if len(self._ended) < 2:
            return SHORTEST_WAIT
        seconds = time.monotonic() - self._ended[0][0]
        rate = sum(count for _, count in self._ended) / max(seconds, 1e-3)
        return max(SHORTEST_WAIT, min(LONGEST_WAIT, math.ceil((self.waiting + sequences) / rate)))

    def drain(self) -> None:
        """Let nobody in any more."""
        self.draining = True

    async def emptied(self) -> None:
        """Wait until nobody is inside."""
        await self._empty.wait()
