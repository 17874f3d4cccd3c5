"""Endurance of `minilora serve`: more clients than it has room for, and users whose adapters change meanwhile.

    python bench/soak_http.py --overload 200 --queue 32
    python bench/soak_http.py --minutes 10 --users 20 --disconnects 0.05 --churn 0.5

--overload: so many clients at the same moment, --bursts times; each gets a whole answer or a clean refusal with
Retry-After. --minutes: users send one request after the other, some leave their stream at a random piece, and adapters
are loaded, replaced and unloaded meanwhile. Every answer is checked, and one in --check is asked for again at the end,
on the same version of its adapters: it must be the same. After each test the server must hold nothing; its open files,
growth of memory and exit code are checked. Exit code 1 where anything was wrong. Last line: one JSON document.
"""

import argparse
import asyncio
import json
import os
import random
import secrets
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
from http_checks import (
    adapters_of,
    draw_request,
    fault,
    held,
    is_clean_refusal,
    read,
    repetition,
    slope,
    times_of,
    waited_too_long,
)
from http_client import Answer, Client
from http_report import Outcome, spread, values_of
from http_servers import OwnServer
from soak import by_tenth
from workload import numbers, save_random_adapter, say, span

from minilora.checkpoint.resolve import resolve_model
from minilora.loading import load_model

# Errors that a request may get whose adapter is unloaded while it arrives or runs.
UNLOADED = ("model_not_found", "adapter_unloaded")
# Seconds in which the server must notice that the last clients left.
SETTLE = 10.0


class Soak:
    """One server's test. versions: the names of the folders in lora_dir."""

    def __init__(self, options: argparse.Namespace, server: OwnServer, admin_key: str, versions: list[str]):
        self.options, self.server, self.versions = options, server, versions
        self.rng = random.Random(options.seed)
        self.client, self.admin = Client(server.url), Client(server.url, admin_key)
        self.process = psutil.Process(server.process.pid)
        # What each name stands for; how many changes of that have begun or ended.
        self.meaning = {version: version for version in versions}
        self.changes: Counter[str] = Counter()
        self.repeats: list[tuple[dict, list[str], list[int]]] = []
        counted = ("finished", "refused", "expired", "left", "unloaded", "changes", "tokens", "wrong")
        self.counts = dict.fromkeys(counted, 0)
        self.faults: list[str] = []
        self.outcomes: list[Outcome] = []
        self.memory: list[tuple[float, float]] = []
        self.files: list[int] = []

    async def get(self, path: str) -> Answer:
        answer = await self.client.send(self.client.request(path))
        if answer.status != 200:
            self.faults.append(f"{path}: status {answer.status}")
        return answer

    # ------------------------------------------------------------ one request

    async def ask(self, crowd: bool = False) -> None:
        """Send a random request and judge its answer. crowd: the server may be full."""
        body = draw_request(self.rng, self.base, list(self.meaning), self.options)
        names = [name for name, _ in adapters_of(body, self.base)]
        versions, changes = [self.meaning[name] for name in names], [self.changes[name] for name in names]
        leaves = not crowd and body["stream"] and self.rng.random() < self.options.disconnects
        after = self.rng.randint(1, body["max_tokens"]) if leaves else None
        outcome = Outcome(time.perf_counter(), len(body["prompt"]))
        try:
            answer = await self.client.send(self.client.request("/v1/completions", body), after)
            reply = read(answer)
        except (OSError, ValueError) as error:
            self.faults.append(repr(error))
            return
        # Which version a request got is known only if its names did not change meanwhile.
        settled = all(n % 2 == 0 for n in changes) and changes == [self.changes[name] for name in names]
        if reply.error in UNLOADED and not settled:
            self.counts["unloaded"] += 1
        elif waited_too_long(reply):
            self.counts["expired"] += 1
        elif crowd and is_clean_refusal(answer):
            self.counts["refused"] += 1
        elif answer.status != 200:
            self.faults.append(f"status {answer.status}: {answer.body.decode(errors='replace')[:200]}")
        elif leaves and not reply.whole:
            self.counts["left"] += 1
        elif wrong := fault(body, reply):
            self.faults.append(wrong)
        else:
            self.finish(answer, outcome, len(reply.tokens), (body, versions, reply.tokens) if settled else None)

    def finish(self, answer: Answer, outcome: Outcome, tokens: int, repeat: tuple | None) -> None:
        outcome.output_tokens, outcome.times = tokens, times_of(answer)
        self.outcomes.append(outcome)
        self.counts["finished"] += 1
        self.counts["tokens"] += tokens
        # A request can't list the same version twice by its own name.
        if repeat and self.counts["finished"] % self.options.check == 0 and len(set(repeat[1])) == len(repeat[1]):
            self.repeats.append(repeat)

    # ------------------------------------------------------------ what goes on beside

    async def user(self) -> None:
        while not self.done():
            await self.ask()

    async def churn(self) -> None:
        """Load, replace and unload adapters under the names a0, a1, ..."""
        while not self.done():
            name, version = f"a{self.rng.randrange(len(self.versions))}", self.rng.choice(self.versions)
            self.changes[name] += 1
            if self.rng.random() < 0.3 and self.meaning.pop(name, None):
                await self.manage("unload", {"lora_name": name, "force": self.rng.random() < 0.5})
            else:
                loaded = name in self.meaning
                await self.manage("load", {"lora_name": name, "lora_path": version, "load_inplace": loaded})
                self.meaning[name] = version
            self.changes[name] += 1
            await asyncio.sleep(self.options.churn)

    async def manage(self, what: str, content: dict) -> None:
        answer = await self.admin.send(self.admin.request(f"/v1/{what}_lora_adapter", content))
        self.counts["changes"] += 1
        if answer.status != 200:
            self.faults.append(f"{what} {content}: {answer.status} {answer.body.decode(errors='replace')[:200]}")

    async def watch(self) -> None:
        while not self.done():
            self.memory.append((time.monotonic() - self.started, self.process.memory_info().rss / 2**20))
            self.files.append(self.process.num_fds())
            await self.get("/health")
            await asyncio.sleep(1)

    def done(self) -> bool:
        return time.monotonic() - self.started > 60 * self.options.minutes

    # ------------------------------------------------------------ the two tests

    async def overload(self) -> dict:
        """All clients at once: as many as there is room for must be let in. Then the server must hold nothing."""
        self.outcomes = []
        room = min(self.options.overload, self.options.max_num_seqs + self.options.queue)
        for _ in range(self.options.bursts):
            before = self._admitted
            await asyncio.gather(*(self.ask(crowd=True) for _ in range(self.options.overload)))
            admitted = self._admitted - before
            if admitted < room:
                self.faults.append(f"{admitted} were let in, where there is room for {room}")
            await self.settle()
        return self.latencies()

    async def endure(self) -> dict:
        """Users, changes and samples until the time is over. Then the server must hold nothing."""
        self.outcomes = []
        self.started = time.monotonic()
        await asyncio.gather(self.churn(), self.watch(), *(self.user() for _ in range(self.options.users)))
        await self.settle()
        growth = slope(self.memory, self.options.warm_up * 60 * self.options.minutes)
        if growth is None:
            self.faults.append("too few samples of memory to judge its growth: give more --minutes")
        elif growth > self.options.most_growth:
            self.faults.append(f"memory grows by {growth:.3f} MB a minute")
        return {
            **self.latencies(),
            "seconds": round(time.monotonic() - self.started, 1),
            "rss_mb_by_tenth": by_tenth([mb for _, mb in self.memory]),
            "rss_mb_per_minute": growth and round(growth, 3),
            "most_files": max(self.files),
        }

    @property
    def _admitted(self) -> int:
        return self.counts["finished"] + self.counts["expired"]

    def latencies(self) -> dict:
        streamed = [outcome for outcome in self.outcomes if len(outcome.times) > 1]
        return spread("ttft", values_of("ttft", streamed), "50,95,99") | spread(
            "e2el", values_of("e2el", self.outcomes), "50,95,99"
        )

    async def settle(self) -> None:
        """Wait until the server holds nothing."""
        end = time.monotonic() + SETTLE
        while (left := held((await self.get("/metrics")).body.decode())) and time.monotonic() < end:
            await asyncio.sleep(0.1)
        if left:
            self.faults.append(f"left over: {left}")
        await self.get("/health")

    # ------------------------------------------------------------ all of it

    async def run(self) -> dict:
        self.base = json.loads((await self.get("/v1/models")).body)["data"][0]["id"]
        files = await self.warm_up()
        found = {}
        if self.options.overload:
            found["overload"] = await self.overload()
        if self.options.minutes:
            found["soak"] = await self.endure()
        for body, versions, tokens in self.repeats:
            again = self.client.request("/v1/completions", repetition(body, self.base, versions))
            self.counts["wrong"] += read(await self.client.send(again)).tokens != tokens
        await self.settle()
        if (left := await self.closed(files)) > files:
            self.faults.append(f"{left} files are open at the end, {files} at the start")
        return {**self.counts, "repeated": len(self.repeats), **found, "files": [files, left]}

    async def warm_up(self) -> int:
        """Have the server open what it opens once; returns its number of open files."""
        for version in self.versions:
            await self.manage("load", {"lora_name": "warm", "lora_path": version, "load_inplace": True})
        await self.manage("unload", {"lora_name": "warm"})
        await asyncio.gather(*(self.ask() for _ in range(self.options.max_num_seqs)))
        await self.settle()
        return await self.closed(0)

    async def closed(self, least: int) -> int:
        """The server's open files after all connections to it are closed: as soon as they are `least`, or after 2 s."""
        self.client.close()
        self.admin.close()
        end = time.monotonic() + 2.0
        while (count := self.process.num_fds()) > least and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return count


def run(options: argparse.Namespace, lora_dir: Path) -> dict:
    """Start a server, test and end it."""
    config = load_model(resolve_model(options.model, say), options.model).weights.config
    options.vocab_size = config.vocab_size
    versions = []
    for i in range(options.adapters):
        rank = options.ranks[i % len(options.ranks)]
        versions.append(save_random_adapter(lora_dir / f"r{rank}-{i}", config, rank, i).name)
    admin_key = os.environ["MINILORA_ADMIN_KEY"] = secrets.token_hex(16)
    arguments = ["--lora-dir", str(lora_dir), "--enable-runtime-lora", "--max-num-queued-reqs", str(options.queue)]
    with tempfile.TemporaryFile("w+") as log:
        with OwnServer(options, {}, arguments, log) as server:
            soak = Soak(options, server, admin_key, versions)
            found = asyncio.run(soak.run())
        log.seek(0)
        logged = [line.rstrip() for line in log if line.startswith(("WARNING:", "ERROR:", "CRITICAL:", "Traceback"))]
    code, faults = server.process.returncode, soak.faults
    faults += [f"exit code {code}"] if code else []
    faults += [line for line in logged if not line.startswith("WARNING:")]
    return {**found, "logged": dict(Counter(logged).most_common(5)), "faults": len(faults), "first_faults": faults[:5]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overload", type=int, default=0, metavar="CLIENTS", help="clients at once")
    parser.add_argument("--bursts", type=int, default=2, help="how often, with --overload")
    parser.add_argument("--queue", type=int, default=32, help="the server's --max-num-queued-reqs")
    parser.add_argument("--minutes", type=float, default=0)
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--disconnects", type=float, default=0.05, help="share of streams that their clients leave")
    parser.add_argument("--churn", type=float, default=0.5, help="seconds between two changes of adapters")
    parser.add_argument(
        "--warm-up", type=float, default=0.3, help="share of --minutes before growth of memory is measured"
    )
    parser.add_argument(
        "--most-growth", type=float, default=3.0, help="MB of memory a minute that are allowed after that"
    )
    parser.add_argument("--check", type=int, default=50, help="one in so many answers is asked for again")
    parser.add_argument("--prompt", type=span, default=(4, 200), help="tokens, N or LOW-HIGH")
    parser.add_argument("--generate", type=span, default=(1, 80), help="tokens, N or LOW-HIGH")
    parser.add_argument("--adapters", type=int, default=24)
    parser.add_argument("--ranks", type=numbers, default=[8, 16, 32, 64])
    parser.add_argument("--folder", type=Path, help="where the random adapters are; a temporary folder if not given")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--max-num-seqs", type=int, default=16)
    for name in ("dtype", "kv-cache-dtype"):
        parser.add_argument(f"--{name}", default="auto")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument(
        "--lora-memory", type=int, default=128 << 20, help="bytes; too few for all default adapters at once"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--serve-arguments", default="", help="more arguments of `minilora serve`")
    options = parser.parse_args()
    if not options.overload and not options.minutes:
        parser.error("give --overload, --minutes or both")
    return options


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        result = run(options, options.folder or Path(folder))
    print(json.dumps(result))
    sys.exit(1 if result["faults"] or result["wrong"] else 0)


if __name__ == "__main__":
    main()
