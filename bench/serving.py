"""Load on AsyncEngine, without HTTP: closed loop or open loop, with any mix of adapters.

    python bench/serving.py --requests 24 --concurrency 8 --prompt 128 --generate 64 --adapters 8
    python bench/serving.py --requests 240 --adapters 200 --popularity zipf:1 --ranks 16
    python bench/serving.py --requests 100 --rate 2 --burstiness 0.5
    python bench/serving.py --requests 100 --trace trace.csv

Closed loop: --concurrency requests in flight at any time. Open loop (--rate or --trace): requests come when they are
due. Adapters are random PEFT folders under --folder, registered by name and read when a request first needs them.
--compare runs the same load with other settings in turn, --repeats times each, and reports the median ratio of output
tokens per second, the load as asked over the other. TPOT: the mean time between a request's tokens after its first.
Last line: one JSON document.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from workload import add_arguments, make_arrivals, save_random_adapter

from minilora import AsyncEngine, LoRARequest, SamplingParams
from minilora_kernels import cpu


class Measured:
    """What one request saw, in seconds of perf_counter's clock."""

    def __init__(self, due: float):
        self.due, self.first, self.last, self.tokens = due, None, None, 0

    def note(self, count: int) -> None:
        now = time.perf_counter()
        self.first, self.last, self.tokens = self.first or now, now, self.tokens + count


class Memory:
    """Peak resident bytes of this process while it is open."""

    def __enter__(self):
        self.peak, self._end = psutil.Process().memory_info().rss, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._end.wait(0.05):
            self.peak = max(self.peak, process.memory_info().rss)

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()


async def send(engine, arrival, measured) -> None:
    params = SamplingParams(max_tokens=arrival.generate, temperature=0, ignore_eos=True)
    lora = None if arrival.adapter is None else LoRARequest(f"a{arrival.adapter}")
    async for delta in engine.generate({"prompt_token_ids": list(arrival.prompt)}, params, lora):
        measured.note(sum(len(output.token_ids) for output in delta.outputs))


async def closed_loop(engine, arrivals, concurrency: int) -> list[Measured]:
    waiting, found = iter(arrivals), []

    async def client():
        for arrival in waiting:
            found.append(Measured(time.perf_counter()))
            await send(engine, arrival, found[-1])

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return found


async def open_loop(engine, arrivals) -> list[Measured]:
    start = time.perf_counter()

    async def one(arrival):
        await asyncio.sleep(max(0.0, start + arrival.at - time.perf_counter()))
        # From when the request was due: else a slow engine would delay the clock that it is measured by.
        measured = Measured(start + arrival.at)
        await send(engine, arrival, measured)
        return measured

    return await asyncio.gather(*(one(arrival) for arrival in arrivals))


def percentiles(values: list[float]) -> dict[str, float]:
    """Mean and percentiles in milliseconds."""
    if not values:
        return {}
    at = {f"p{p}": float(np.percentile(values, p)) for p in (50, 95, 99)}
    return {name: round(1000 * value, 2) for name, value in {"mean": statistics.fmean(values), **at}.items()}


async def measure(options: argparse.Namespace) -> dict:
    """One load on a fresh engine."""
    engine = AsyncEngine(
        options.model,
        dtype=options.dtype,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_loras=max(options.max_num_seqs, 1),
        max_step_ms=options.max_step_ms,
        num_speculative_tokens=options.num_speculative_tokens,
        kv_cache_dtype=options.kv_cache_dtype,
        lora_memory=options.lora_memory,
        threads=options.threads,
    )
    config = engine.model.weights.config
    arrivals = make_arrivals(options, config.vocab_size, options.max_model_len)
    for number in sorted({a.adapter for a in arrivals if a.adapter is not None}):
        rank = options.ranks[number % len(options.ranks)]
        folder = save_random_adapter(options.folder / f"r{rank}-{number}", config, rank, number)
        await engine.add_lora(f"a{number}", str(folder), load=options.preload)
    names = sorted({f"a{a.adapter}" for a in arrivals if a.adapter is not None}) if options.preload else []
    for lora in (None, *map(LoRARequest, names)):
        await engine.complete({"prompt_token_ids": [3] * 40}, SamplingParams(max_tokens=4, ignore_eos=True), lora)
    before, process = await engine.stats(), psutil.Process()
    used, started = sum(process.cpu_times()[:2]), time.perf_counter()
    with Memory() as memory:
        opened = options.rate or options.trace
        found = await (open_loop(engine, arrivals) if opened else closed_loop(engine, arrivals, options.concurrency))
    seconds = time.perf_counter() - started
    used, after = sum(process.cpu_times()[:2]) - used, await engine.stats()
    engine.close()
    return report(found, before, after, seconds, used, memory.peak)


def report(found: list[Measured], before, after, seconds: float, used: float, peak: int) -> dict:
    tokens, adapters = sum(m.tokens for m in found), after.adapters
    return {
        "requests": len(found),
        "seconds": round(seconds, 3),
        "output_tokens_per_s": round(tokens / seconds, 1),
        "requests_per_s": round(len(found) / seconds, 3),
        "ttft_ms": percentiles([m.first - m.due for m in found]),
        "tpot_ms": percentiles([(m.last - m.first) / (m.tokens - 1) for m in found if m.tokens > 1]),
        "latency_ms": percentiles([m.last - m.due for m in found]),
        "cpu_cores": round(used / seconds, 2),
        "peak_rss_mb": round(peak / 2**20, 1),
        "adapter_loads": adapters.loads,
        "adapter_load_ms": round(1000 * adapters.load_seconds / max(adapters.loads, 1), 1),
        "adapter_longest_load_ms": round(1000 * adapters.longest_load, 1),
        "adapter_hits": adapters.hits,
        "adapter_swaps": adapters.insertions,
        "adapter_swap_ms": round(1000 * adapters.swap_seconds / max(adapters.insertions, 1), 1),
        "adapter_evictions": adapters.evictions,
        "adapter_mb": round(adapters.bytes / 2**20, 1),
        "prefix_hit_pages": after.prefix_hits - before.prefix_hits,
        "prefix_lookup_pages": after.prefix_lookups - before.prefix_lookups,
        "preemptions": after.preemptions - before.preemptions,
        "steps": after.steps - before.steps,
    }


def line(run: dict) -> str:
    """A run's main figures."""
    ttft, tpot = (run[name].get("p50", float("nan")) for name in ("ttft_ms", "tpot_ms"))
    return (
        f"{run['output_tokens_per_s']:9.1f} tokens/s, {run['requests_per_s']:7.2f} requests/s, "
        f"median TTFT {ttft:8.1f} ms, TPOT {tpot:7.1f} ms"
    )


def variants(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[tuple[str, argparse.Namespace]]:
    """(name, options) of each load: as asked, then with each --compare's words as further options."""
    found = [("asked", options)]
    for text in options.compare:
        words = [f"--{word}" for word in text.split()]
        found.append((text, parser.parse_args(words, argparse.Namespace(**vars(options)))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--max-step-ms", type=int, default=100)
    parser.add_argument("--num-speculative-tokens", type=int, default=0, help="random prompts give texts that loop")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--lora-memory", type=int, help="bytes")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--preload", action="store_true", help="read and use each adapter once before the load begins")
    parser.add_argument("--folder", type=Path, help="where the random adapters are; a temporary folder if not given")
    parser.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="'OPTION=VALUE ...'",
        help="another load, by options without their dashes; repeatable",
    )
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.folder = options.folder or Path(folder)
        names, loads = zip(*variants(parser, options), strict=True)
        runs: dict[str, list[dict]] = {name: [] for name in names}
        for _ in range(options.repeats):
            for name, load in zip(names, loads, strict=True):
                runs[name].append(asyncio.run(measure(load)))
                if not options.json:
                    print(f"{line(runs[name][-1])}   {name}", flush=True)
    ratios = {
        name: statistics.median(
            first["output_tokens_per_s"] / other["output_tokens_per_s"]
            for first, other in zip(runs["asked"], runs[name], strict=True)
        )
        for name in names[1:]
    }
    if not options.json:
        for name, ratio in ratios.items():
            print(f"ratio {ratio:7.2f}, asked over {name}, median of {options.repeats}")
    machine = {"cpu": cpu.target()[1], "family": cpu.family(), "cores": os.cpu_count(), "platform": platform.platform()}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "json"}
    print(json.dumps({"settings": settings, "machine": machine, "runs": runs, "ratios": ratios}))


if __name__ == "__main__":
    main()
