"""What the page's dashboard shows: the engine's figures in one document, now or once a second."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

from .. import __version__
from ..async_engine import AsyncEngine
from ..stats import Histogram, Stats
from .admission import Gate
from .failures import ApiError
from .names import Names

PERIOD = 1.0
MOST_WATCHERS = 4
RETRY_AFTER = 10
# Adapters in one document: those with requests first, then those used last.
MOST_ADAPTERS = 100
# Rates are over this many seconds, or since the look before where that is longer ago.
WINDOW = 5.0

Document = dict[str, Any]


class Rates:
    """How fast counters grow. Each look adds a sample."""

    def __init__(self) -> None:
        self._samples = deque([(time.monotonic(), (0, 0))])

    def add(self, counters: tuple[int, int]) -> tuple[float, float]:
        """Take in what the counters say now; returns their growth per second."""
        now, samples = time.monotonic(), self._samples
        while len(samples) > 1 and samples[0][0] < now - WINDOW:
            samples.popleft()
        then, before = samples[0]
        samples.append((now, counters))
        seconds = max(now - then, 1e-3)
        return (counters[0] - before[0]) / seconds, (counters[1] - before[1]) / seconds


class Dashboard:
    """The dashboard's document. All calls from one event loop."""

    def __init__(self, engine: AsyncEngine, names: Names, gate: Gate):
        self._engine, self._names, self._gate = engine, names, gate
        self._started = time.monotonic()
        self._rates = Rates()
        self._last: tuple[float, Document] = (float("-inf"), {})
        self._lock = asyncio.Lock()
        self.watchers = 0

    async def read(self, age: float = 0.0) -> Document:
        """The document, not older than `age` seconds. Raises EngineDeadError."""
        async with self._lock:
            made, document = self._last
            if time.monotonic() - made >= age:
                document = self._document(await self._engine.stats())
                self._last = (time.monotonic(), document)
            return document

    async def watch(self) -> AsyncGenerator[Document]:
        """The document once a second until the server has drained. Raises ApiError and EngineDeadError."""
        self.check_room()
        self.watchers += 1
        try:
            while True:
                # All watchers see one document: the engine is asked once a second, however many there are.
                document = await self.read(age=PERIOD * 0.9)
                yield document
                # Every watcher is told before it is left.
                if document["state"] == "draining" and not self._gate.active:
                    return
                await asyncio.sleep(PERIOD)
        finally:
            self.watchers -= 1

    def check_room(self) -> None:
        """Raise ApiError where no more may watch."""
        if self.watchers >= MOST_WATCHERS:
            cause = f"{MOST_WATCHERS} dashboards are open, no more are served"
            raise ApiError(429, cause, None, "too_many_dashboards", RETRY_AFTER)

    def _document(self, stats: Stats) -> Document:
        total, capacity = stats.total, max(stats.pages, 1)
        prompt, generation = self._rates.add((total.prompt_tokens, total.generated_tokens))
        return {
            "state": "draining" if self._gate.draining else "ready",
            "model": self._names.base[0],
            "version": __version__,
            "uptime": round(time.monotonic() - self._started, 1),
            "threads": stats.threads,
            "running": stats.running,
            "waiting": stats.waiting,
            "tokens_per_s": {"prompt": round(prompt, 2), "generation": round(generation, 2)},
            "kv_cache_usage": stats.pages_held / capacity,
            "prefix_cache_hit_rate": stats.prefix_hits / stats.prefix_lookups if stats.prefix_lookups else None,
            "preemptions": stats.preemptions,
            "prompt_tokens": total.prompt_tokens,
            "generation_tokens": total.generated_tokens,
            "latency": {
                "time_to_first_token": percentiles(total.time_to_first_token),
                "inter_token_latency": percentiles(total.inter_token_time),
                "e2e_request_latency": percentiles(total.latency),
            },
            "adapters_registered": len(stats.adapter_states),
            "adapters": adapter_rows(stats)[:MOST_ADAPTERS],
        }


def adapter_rows(stats: Stats) -> list[Document]:
    """A row for each adapter: the busy ones first, then the last used. last_used: seconds since 1970."""
    now, clock = time.time(), time.perf_counter()
    rows = []
    for name, state in stats.adapter_states.items():
        load, traffic = stats.load_by_adapter.get(name), stats.by_adapter.get(name)
        last = None if traffic is None else traffic.last_request
        rows.append(
            {
                "name": name,
                "state": state.state,
                "rank": state.rank,
                "bytes": state.bytes,
                "running": load.running if load else 0,
                "waiting": load.waiting if load else 0,
                "requests": traffic.requests if traffic else 0,
                "last_used": None if last is None else round(now - (clock - last), 1),
            }
        )
    return sorted(rows, key=lambda row: (-row["running"] - row["waiting"], -(row["last_used"] or 0), row["name"]))


def percentiles(histogram: Histogram) -> dict[str, float | None]:
    """p50, p95 and p99 in seconds; None before the first value."""
    return {f"p{p}": quantile(histogram, p / 100) for p in (50, 95, 99)}


def quantile(histogram: Histogram, share: float) -> float | None:
    """The value that a share of all is not above, as PromQL's histogram_quantile finds it: linear within a bucket."""
    rank, below, lower = share * histogram.count, 0, 0.0
    if not histogram.count:
        return None
    for upper, count in zip(histogram.bounds, histogram.counts, strict=False):
        if count and below + count >= rank:
            return lower + (upper - lower) * (rank - below) / count
        below, lower = below + count, upper
    # Beyond the last bound nothing is known but that it is more.
    return histogram.bounds[-1]
