"""Load on any OpenAI-compatible server over HTTP: closed loop or open loop, with adapters as model names.

    python bench/serve_http.py --base-url http://127.0.0.1:8000 --lora-modules pirate json
    python bench/serve_http.py --start --adapters 8 --requests 24 --concurrency 8
    python bench/serve_http.py --start --compare-engine --repeats 5
    python bench/serve_http.py --start --model model.gguf --llama-server llama-server --repeats 3

The requests are bench/workload.py's, sent to /v1/completions as token ids, streamed. --start starts `minilora serve`
on a free port with random adapters a0, a1, ... --compare-engine runs the same load without HTTP, on AsyncEngine in a
process of its own (bench/serving.py), in turn; --llama-server runs it on llama.cpp's server with the same adapters.
With --start each run has a fresh server, so that nothing is cached from the one before. Last line: one JSON document
with the keys of `vllm bench serve`, of the run with the median output_throughput, and all runs with their ratios.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from http_client import Client
from http_report import Outcome, add_report_arguments, summarise
from http_servers import OwnServer, on_engine, on_llama_server, wait_until_ready
from workload import Arrival, add_arguments, make_arrivals, save_random_adapter, say

from minilora.checkpoint.resolve import resolve_model
from minilora.loading import load_model
from minilora_kernels import cpu

# ------------------------------------------------------------ one load


async def send(client: Client, path: str, content: dict, outcome: Outcome) -> None:
    """One request and what it saw."""
    request = client.request(path, content)
    try:
        answer = await client.send(request)
    except OSError as error:
        outcome.error = str(error) or type(error).__name__
        return
    if answer.status != 200:
        outcome.error = f"{answer.status}: {answer.body.decode(errors='replace')[:200]}"
        return
    for when, event in answer.events():
        if "error" in event:
            outcome.error = str(event["error"])
        if event.get("choices"):
            outcome.times.append(when)
        if event.get("usage"):
            outcome.output_tokens = event["usage"]["completion_tokens"]
    if not outcome.times and not outcome.error:
        outcome.error = "the stream had no text"


def body(arrival: Arrival, model: str) -> dict:
    """The completion request of an arrival."""
    return {
        "model": model,
        "prompt": list(arrival.prompt),
        "max_tokens": arrival.generate,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def run_load(client: Client, arrivals: list[Arrival], options: argparse.Namespace) -> tuple[list[Outcome], float]:
    """(what each request saw, seconds for all)."""
    outcomes: list[Outcome] = []
    start = time.perf_counter()

    async def one(arrival: Arrival, due: float) -> None:
        outcomes.append(Outcome(due, len(arrival.prompt)))
        model = options.model_name if arrival.adapter is None else options.lora_modules[arrival.adapter]
        await send(client, options.endpoint, body(arrival, model), outcomes[-1])

    async def come(arrival: Arrival) -> None:
        await asyncio.sleep(max(0.0, start + arrival.at - time.perf_counter()))
        await one(arrival, start + arrival.at)

    async def user(waiting) -> None:
        for arrival in waiting:
            await one(arrival, time.perf_counter())

    if options.rate or options.trace:
        await asyncio.gather(*(come(arrival) for arrival in arrivals))
    else:
        waiting = iter(arrivals)
        await asyncio.gather(*(user(waiting) for _ in range(options.concurrency)))
    return outcomes, time.perf_counter() - start


async def measure(url: str, arrivals: list[Arrival], options: argparse.Namespace, server: OwnServer | None) -> dict:
    """One load on a server that is ready, after a warm-up with every adapter of the load."""
    client = Client(url, os.environ.get("OPENAI_API_KEY"))
    listed = json.loads((await client.send(client.request("/v1/models"))).body)
    options.model_name = options.model_name or listed["data"][0]["id"]
    warm = [Arrival(0.0, (3,) * 40, 4, adapter) for adapter in {arrival.adapter for arrival in arrivals}]
    await run_load(client, warm, argparse.Namespace(**{**vars(options), "rate": None, "trace": None}))
    used, served = time.process_time(), server.cpu_seconds() if server else 0.0
    outcomes, seconds = await run_load(client, arrivals, options)
    used, served = time.process_time() - used, server.cpu_seconds() - served if server else 0.0
    found = {**summarise(outcomes, seconds, options), "client_cores": round(used / seconds, 3)}
    if server:
        found["server_cores"] = round(served / seconds, 3)
    found["first_error"] = next((o.error for o in outcomes if o.error), None)
    client.close()
    return found


# ------------------------------------------------------------ servers in turn


def over_http(options: argparse.Namespace, arrivals: list[Arrival], adapters: dict[str, Path]) -> dict:
    """A run on a server of our own, or on the one that is given."""
    if not options.start:
        return asyncio.run(measure(options.base_url, arrivals, options, None))
    with OwnServer(options, adapters) as server:
        return asyncio.run(measure(server.url, arrivals, options, server))


def run_all(options: argparse.Namespace, config, folder: Path) -> dict[str, list[dict]]:
    """The runs of each server, in turn."""
    vocabulary = config.vocab_size if config else options.vocab_size
    arrivals = make_arrivals(options, vocabulary, options.max_model_len)
    adapters = {}
    if options.start:
        for i in range(options.adapters):
            rank = options.ranks[i % len(options.ranks)]
            adapters[f"a{i}"] = save_random_adapter(options.folder / f"r{rank}-{i}", config, rank, i)
    runs: dict[str, list[dict]] = {"http": []}
    for _ in range(options.repeats):
        runs["http"].append(over_http(options, arrivals, adapters))
        if options.compare_engine:
            runs.setdefault("engine", []).append(on_engine(options))
        if options.llama_server:
            runs.setdefault("llama_server", []).append(on_llama_server(options, arrivals, config, folder))
        for name, found in runs.items():
            lost = f", {found[-1]['failed']} requests failed" if found[-1].get("failed") else ""
            print(f"{name:12} {found[-1]['output_throughput']:9.1f} tokens/s{lost}", flush=True)
    return runs


def document(options: argparse.Namespace, runs: dict[str, list[dict]]) -> dict:
    """The JSON document. ratios: http over the other, the median of all pairs."""
    middle = sorted(runs["http"], key=lambda run: run["output_throughput"])[(len(runs["http"]) - 1) // 2]
    ratios = {
        name: statistics.median(
            mine["output_throughput"] / other["output_throughput"]
            for mine, other in zip(runs["http"], found, strict=True)
        )
        for name, found in runs.items()
        if name != "http"
    }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "backend": "openai",
        "model_id": options.model_name,
        "num_prompts": middle["completed"] + middle["failed"],
        "request_rate": None if options.trace else options.rate or "inf",
        "burstiness": options.burstiness,
        "max_concurrency": None if options.rate or options.trace else options.concurrency,
        **middle,
        "metadata": dict(entry.partition("=")[::2] for entry in options.metadata),
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "machine": {"cpu": cpu.target()[1], "cores": os.cpu_count(), "platform": platform.platform()},
        "runs": runs,
        "ratios": ratios,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    add_report_arguments(parser)
    parser.add_argument(
        "--base-url", default="http://127.0.0.1:8000", help="a running server; its key in the variable OPENAI_API_KEY"
    )
    parser.add_argument("--endpoint", default="/v1/completions")
    parser.add_argument(
        "--served-model-name", dest="model_name", help="the base model's name there; by default the first listed"
    )
    parser.add_argument("--lora-modules", nargs="*", help="the adapters' names there, all used; by default a0, a1, ...")
    parser.add_argument("--vocab-size", type=int, default=32000, help="with --base-url: bound of the token ids")
    parser.add_argument("--ready-check-timeout-sec", type=float, default=60)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--start", action="store_true", help="start `minilora serve` anew for each run")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="with --start")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--num-speculative-tokens", type=int, default=0, help="random prompts give texts that loop")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--lora-memory", type=int, help="bytes")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--folder", type=Path, help="where the random adapters are; a temporary folder if not given")
    parser.add_argument("--serve-arguments", default="", help="with --start: more arguments of `minilora serve`")
    parser.add_argument(
        "--compare-engine", action="store_true", help="with --start: the same load without HTTP, in turn"
    )
    parser.add_argument("--llama-server", help="with --start: llama.cpp's llama-server, in turn")
    parser.add_argument("--gguf", help="the model that it serves; by default --model")
    parser.add_argument("--llama-server-arguments", default="", help="more arguments of llama-server")
    options = parser.parse_args()
    if (options.compare_engine or options.llama_server) and not options.start:
        parser.error("comparisons need --start: all sides are fresh then")
    if options.llama_server and (options.rate or options.trace):
        parser.error("llama-server gets its load in a closed loop: leave out --rate and --trace")
    if options.start and options.lora_modules:
        parser.error("--lora-modules names the adapters of a running server: leave it out with --start")
    options.lora_modules = options.lora_modules or [f"a{i}" for i in range(options.adapters)]
    options.adapters = len(options.lora_modules)
    return options


def main() -> None:
    options = parse()
    config = None
    if options.start:
        config = load_model(resolve_model(options.model, say), options.model).weights.config
    else:
        wait_until_ready(options.base_url, options.ready_check_timeout_sec)
    with tempfile.TemporaryDirectory() as folder:
        options.folder = options.folder or Path(folder) / "peft"
        found = document(options, run_all(options, config, Path(folder)))
    for name, ratio in found["ratios"].items():
        print(f"ratio {ratio:7.2f}, http over {name}, median of {options.repeats}")
    if options.save_result:
        Path(options.save_result).write_text(json.dumps(found))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
