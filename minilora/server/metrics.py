"""What Prometheus reads: vLLM's metrics under their names and labels, so that gateways and panels made for it work,
and minilora's own.

Everything is made from the engine's Stats when it is asked for. Labels come from the configuration, the program and
the registered adapters, never from a request: nobody can make the document grow.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import accumulate
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ..async_engine import AsyncEngine
from ..errors import EngineDeadError
from ..stats import AdapterStats, Histogram, Stats, Traffic
from .admission import Gate

LABELS = ("model_name", "engine")
# vLLM numbers the engines of one server; here there is one.
ENGINE = "0"
FINISHED = ("stop", "length", "abort", "error")
# Seconds that the engine has for telling, between two of its steps.
LONGEST_WAIT = 2.0


class Row(NamedTuple):
    """A metric, its description, and where its value is."""

    name: str
    help: str
    value: Callable


GAUGES = (
    Row("vllm:num_requests_running", "Texts that run.", lambda s: s.running),
    Row("vllm:num_requests_waiting", "Texts that wait.", lambda s: s.waiting),
    Row("vllm:kv_cache_usage_perc", "Share of the KV pages in use, 0 to 1.", lambda s: s.pages_held / max(1, s.pages)),
    Row(
        "minilora:kv_cache_kept_perc",
        "Share of the KV pages kept for reuse.",
        lambda s: s.pages_cached / max(1, s.pages),
    ),
    Row("minilora:cpu_threads", "Threads that compute.", lambda s: s.threads),
)
COUNTERS = (
    Row("vllm:num_preemptions", "Texts that lost their pages to others and began anew.", lambda s: s.preemptions),
    Row("vllm:prompt_tokens", "Tokens of prompts.", lambda s: s.total.prompt_tokens),
    Row("vllm:prompt_tokens_cached", "Of these, found in the prefix cache.", lambda s: s.total.cached_tokens),
    Row("vllm:generation_tokens", "Generated tokens.", lambda s: s.total.generated_tokens),
    Row("vllm:spec_decode_num_drafts", "How often tokens of a text were drafted.", lambda s: s.drafts),
    Row("vllm:spec_decode_num_draft_tokens", "Guessed tokens.", lambda s: s.draft_tokens),
    Row("vllm:spec_decode_num_accepted_tokens", "Of these, right ones.", lambda s: s.accepted_tokens),
    Row("minilora:requests", "Texts asked for.", lambda s: s.total.requests),
    Row("minilora:steps", "Steps of the engine.", lambda s: s.steps),
)
HISTOGRAMS = (
    Row("vllm:iteration_tokens_total", "Tokens of a step.", lambda s: s.course.step_tokens),
    Row("vllm:request_prompt_tokens", "Tokens of a prompt.", lambda s: s.course.prompt_tokens),
    Row("vllm:request_generation_tokens", "Tokens of a text.", lambda s: s.course.generated_tokens),
    Row("vllm:request_params_n", "Texts that a request asks for.", lambda s: s.course.texts),
    Row("vllm:request_params_max_tokens", "Tokens that a text may have.", lambda s: s.course.max_tokens),
    Row("vllm:request_num_preemptions", "How often a text lost its pages.", lambda s: s.course.preemptions),
    Row("vllm:time_to_first_token_seconds", "From submission.", lambda s: s.total.time_to_first_token),
    Row("vllm:inter_token_latency_seconds", "Between two tokens of a text.", lambda s: s.total.inter_token_time),
    Row(
        "vllm:request_time_per_output_token_seconds",
        "A text's mean after its first.",
        lambda s: s.course.time_per_token,
    ),
    Row("vllm:e2e_request_latency_seconds", "From submission to the last token.", lambda s: s.total.latency),
    Row("vllm:request_queue_time_seconds", "From submission to the first step.", lambda s: s.course.queue_time),
    Row("vllm:request_prefill_time_seconds", "From there to the first token.", lambda s: s.course.prefill_time),
    Row("vllm:request_decode_time_seconds", "From there to the last token.", lambda s: s.course.decode_time),
    Row("vllm:request_inference_time_seconds", "Prefill and decode.", lambda s: s.course.inference_time),
)
# minilora's own, of all adapters together; reads AdapterStats.
POOL_GAUGES = (
    Row("minilora:adapters_registered", "Adapters that have a name.", lambda a: a.registered),
    Row("minilora:adapters_resident", "Adapters in the pool.", lambda a: a.resident),
    Row("minilora:adapters_in_use", "Adapters that texts hold.", lambda a: a.in_use),
    Row("minilora:adapter_pool_bytes", "Bytes of adapters in the pool.", lambda a: a.bytes),
    Row("minilora:adapter_pool_capacity_bytes", "Bytes of the pool.", lambda a: a.capacity),
)
POOL_COUNTERS = (
    Row("minilora:adapter_hits", "Starts that found their adapter in the pool.", lambda a: a.hits),
    Row("minilora:adapter_insertions", "Adapters put into the pool.", lambda a: a.insertions),
    Row("minilora:adapter_evictions", "Adapters that made room for others.", lambda a: a.evictions),
    Row("minilora:adapter_loads", "Adapters read from disk.", lambda a: a.loads),
    Row("minilora:adapter_load_failures", "Of these, that could not be used.", lambda a: a.failures),
    Row("minilora:adapter_load_seconds", "Time spent on reading them.", lambda a: a.load_seconds),
    Row("minilora:adapter_swap_seconds", "Time spent on putting them into the pool.", lambda a: a.swap_seconds),
)
# By the adapter's name, "" for the base model; reads Traffic.
ADAPTER_COUNTERS = (
    Row("minilora:adapter_requests", "Texts asked for.", lambda t: t.requests),
    Row("minilora:adapter_prompt_tokens", "Tokens of prompts.", lambda t: t.prompt_tokens),
    Row("minilora:adapter_generation_tokens", "Generated tokens.", lambda t: t.generated_tokens),
)


class Metrics:
    """The document for Prometheus. For one event loop."""

    def __init__(self, engine: AsyncEngine, gate: Gate, model_name: str):
        self._engine, self._gate, self._labels = engine, gate, (model_name, ENGINE)
        self._answers: Counter[tuple[str, int]] = Counter()
        self._last: Stats | None = None

    def count(self, route: str, status: int) -> None:
        """Note an answer. route: as it is written in the program."""
        self._answers[route, status] += 1

    async def render(self) -> bytes:
        """The document. Of an engine that is dead, or in a step that does not end, it tells the last that is known."""
        with suppress(EngineDeadError, TimeoutError):
            self._last = await asyncio.wait_for(self._engine.stats(), LONGEST_WAIT)
        alive = int(self._engine.dead is None)
        return generate_latest(_Families([*self._server(alive), *(self._engine_families(self._last))]))

    # ------------------------------------------------------------ what the server knows

    def _server(self, alive: int) -> Iterator[Metric]:
        yield self._gauge("minilora:engine_up", "1 while the engine lives.", alive)
        rejections = CounterMetricFamily(
            "vllm:admission_rejections", "Requests refused for load.", labels=(*LABELS, "reason")
        )
        for reason, count in self._gate.rejections.items():
            rejections.add_metric((*self._labels, reason), count)
        yield rejections
        answers = CounterMetricFamily("minilora:http_responses", "Answers.", labels=("route", "status"))
        for (route, status), count in sorted(self._answers.items()):
            answers.add_metric((route, str(status)), count)
        yield answers

    # ------------------------------------------------------------ what the engine knows

    def _engine_families(self, stats: Stats | None) -> Iterator[Metric]:
        if stats is None:
            return
        for row in GAUGES:
            yield self._gauge(row.name, row.help, row.value(stats))
        for row in COUNTERS:
            yield self._counter(row.name, row.help, row.value(stats))
        for row in HISTOGRAMS:
            yield self._histogram(row.name, row.help, {(): row.value(stats)})
        yield self._histogram(
            "minilora:step_seconds", "Time of a step.", {(k,): h for k, h in stats.step_times.items()}, ("phase",)
        )
        yield from self._prefix_cache(stats)
        yield from self._requests(stats)
        yield self._lora_info(stats)
        yield from self._pool(stats.adapters)
        yield from self._adapters(stats.by_adapter)

    def _prefix_cache(self, stats: Stats) -> Iterator[Metric]:
        """In tokens, as vLLM counts."""
        block = self._engine.config.block_size
        yield self._counter("vllm:prefix_cache_queries", "Tokens looked up.", stats.prefix_lookups * block)
        yield self._counter("vllm:prefix_cache_hits", "Tokens found.", stats.prefix_hits * block)
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "Sizes of the KV cache.", labels=("engine", "block_size", "num_gpu_blocks")
        )
        info.add_metric((ENGINE, str(block), str(stats.pages)), 1)
        yield info

    def _requests(self, stats: Stats) -> Iterator[Metric]:
        success = CounterMetricFamily(
            "vllm:request_success", "Texts that ended, by the reason.", labels=(*LABELS, "finished_reason")
        )
        for reason in FINISHED:
            success.add_metric((*self._labels, reason), stats.total.finished[reason])
        yield success
        waiting = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason",
            "Texts that wait for a place (capacity) or their adapter (deferred).",
            labels=(*LABELS, "reason"),
        )
        deferred = stats.waiting_for_adapters
        waiting.add_metric((*self._labels, "capacity"), stats.waiting - deferred)
        waiting.add_metric((*self._labels, "deferred"), deferred)
        yield waiting

    def _lora_info(self, stats: Stats) -> Metric:
        """The adapters at work, as routers read them: in the labels, the value is the time."""
        load = {name: load for name, load in stats.load_by_adapter.items() if name}
        labels = ("max_lora", "waiting_lora_adapters", "running_lora_adapters")
        info = GaugeMetricFamily("vllm:lora_requests_info", "Adapters of requests under way.", labels=labels)
        waiting = ",".join(name for name, of in load.items() if of.waiting)
        running = ",".join(name for name, of in load.items() if of.running)
        info.add_metric((str(self._engine.config.max_loras), waiting, running), time.time())
        return info

    def _pool(self, adapters: AdapterStats) -> Iterator[Metric]:
        for row in POOL_GAUGES:
            yield self._gauge(row.name, row.help, row.value(adapters))
        for row in POOL_COUNTERS:
            yield self._counter(row.name, row.help, row.value(adapters))

    def _adapters(self, traffic: dict[str, Traffic]) -> Iterator[Metric]:
        for row in ADAPTER_COUNTERS:
            family = CounterMetricFamily(row.name, row.help, labels=(*LABELS, "adapter"))
            for name, of in sorted(traffic.items()):
                family.add_metric((*self._labels, name), row.value(of))
            yield family

    # ------------------------------------------------------------ families

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=LABELS)
        family.add_metric(self._labels, value)
        return family

    def _histogram(
        self, name: str, text: str, of: dict[tuple[str, ...], Histogram], more: tuple[str, ...] = ()
    ) -> Metric:
        family = HistogramMetricFamily(name, text, labels=(*LABELS, *more))
        for labels, histogram in of.items():
            bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
            buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
            family.add_metric((*self._labels, *labels), buckets, histogram.total)
        return family


class _Families(Collector):
    """Finished families, as prometheus_client takes them."""

    def __init__(self, families: list[Metric]):
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families
