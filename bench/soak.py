"""Endurance of AsyncEngine: users who come, chat, leave early, and whose adapters are replaced and removed meanwhile.

    python bench/soak.py --minutes 10 --users 20
    python bench/soak.py --requests 10000 --short

One in --check finished answers is computed again at the end, by itself, and must be the same. Resident memory is
sampled throughout; at the end all KV pages and adapters must be free. Exit code 1 where anything was wrong.
Last line: one JSON document.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
from workload import numbers, save_random_adapter

from minilora import AsyncEngine, LoRARequest, SamplingParams
from minilora.errors import AdapterError, MiniloraError, NotFoundError, RequestError


def by_tenth(values: list[float]) -> list[float]:
    """The highest value in each tenth of a run; fewer where there are fewer values."""
    return [round(float(part.max()), 1) for part in np.array_split(values, 10) if len(part)]


class Soak:
    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.rng = options, random.Random(options.seed)
        self.engine = AsyncEngine(
            options.model,
            max_model_len=1024,
            max_num_seqs=16,
            max_loras=8,
            max_cpu_loras=12,
            kv_cache_memory=options.kv_cache_memory,
            debug_checks=options.checks,
        )
        self.config = self.engine.model.weights.config
        self.folders = [
            save_random_adapter(folder / f"r{rank}-{i}", self.config, rank, i)
            for i, rank in enumerate((options.ranks * options.adapters)[: options.adapters])
        ]
        # What each name stands for; how many changes of that have begun or ended; the answers to compute again.
        self.meaning: dict[str, Path] = {}
        self.changes: Counter[str] = Counter()
        self.repeats: list[tuple] = []
        self.counts = dict.fromkeys(("finished", "left", "unloaded", "tokens", "errors", "wrong"), 0)
        self.memory: list[float] = []
        self.errors: list[str] = []

    async def register(self, i: int, folder: Path) -> None:
        name = f"a{i}"
        self.changes[name] += 1
        await self.engine.add_lora(name, str(folder), load=self.rng.random() < 0.5)
        self.meaning[name] = folder
        self.changes[name] += 1

    def request(self):
        rng, short = self.rng, self.options.short
        shared = rng.random() < 0.5
        start = list(range(100, 200)) if shared and not short else []
        length = rng.randint(1, 8) if short else rng.randint(4, 200)
        prompt = start + [rng.randint(3, self.config.vocab_size - 1) for _ in range(length)]
        params = SamplingParams(
            max_tokens=rng.randint(1, 4) if short else rng.randint(1, 80),
            temperature=rng.choice([0.0, 0.8]),
            seed=rng.randint(0, 1 << 30),
            ignore_eos=True,
        )
        return prompt, params, rng.choice([None, *self.meaning])

    async def one(self, leaves: bool) -> None:
        prompt, params, name = self.request()
        folder, changes = (self.meaning.get(name), self.changes[name]) if name else (None, 0)
        lora = LoRARequest(name) if name else None
        stream = self.engine.generate({"prompt_token_ids": prompt}, params, lora)
        tokens: list[int] = []
        try:
            async for delta in stream:
                tokens += [token for output in delta.outputs for token in output.token_ids]
                if leaves and len(tokens) > 3:
                    self.counts["left"] += 1
                    return
        except NotFoundError:
            self.counts["unloaded"] += 1
            return
        except RequestError as error:
            if not isinstance(error.__cause__, AdapterError) or "unloaded" not in str(error.__cause__):
                raise
            self.counts["unloaded"] += 1
            return
        finally:
            await stream.aclose()
        self.counts["finished"] += 1
        self.counts["tokens"] += len(tokens)
        # Which version a request got is known only if its name did not change meanwhile.
        settled = name is None or (changes % 2 == 0 and changes == self.changes[name])
        if self.counts["finished"] % self.options.check == 0 and settled:
            self.repeats.append((prompt, params, folder, tokens))

    async def user(self) -> None:
        while not self.done():
            try:
                await self.one(leaves=self.rng.random() < 0.15)
            except MiniloraError as error:
                self.counts["errors"] += 1
                self.errors.append(repr(error))

    async def churn(self) -> None:
        """Replace, remove and bring back adapters."""
        while not self.done():
            i = self.rng.randrange(len(self.folders))
            if self.rng.random() < 0.3 and f"a{i}" in self.meaning:
                del self.meaning[f"a{i}"]
                self.changes[f"a{i}"] += 2
                await self.engine.remove_lora(f"a{i}", force=self.rng.random() < 0.5)
            else:
                await self.register(i, self.rng.choice(self.folders))
            await asyncio.sleep(0.05 if self.options.short else 0.5)

    async def watch(self) -> None:
        while not self.done():
            self.memory.append(psutil.Process().memory_info().rss / 2**20)
            await asyncio.sleep(1)

    def done(self) -> bool:
        if self.options.requests:
            return self.counts["finished"] + self.counts["left"] >= self.options.requests
        return time.monotonic() - self.started > 60 * self.options.minutes

    async def run(self) -> dict:
        self.started = time.monotonic()
        for i, folder in enumerate(self.folders):
            await self.register(i, folder)
        await asyncio.gather(self.churn(), self.watch(), *(self.user() for _ in range(self.options.users)))
        seconds = time.monotonic() - self.started
        await self.repeat()
        stats = await self.engine.stats()
        await self.engine.check_integrity()
        left = stats.pages_held + stats.running + stats.waiting + stats.adapters.in_use
        self.engine.close()
        return {
            **self.counts,
            "repeated": len(self.repeats),
            "left_over": left,
            "seconds": round(seconds, 1),
            "rss_mb_by_tenth": by_tenth(self.memory),
            "preemptions": stats.preemptions,
            "prefix_hits": stats.prefix_hits,
            "adapter_loads": stats.adapters.loads,
            "adapter_evictions": stats.adapters.evictions,
            "first_errors": self.errors[:5],
        }

    async def repeat(self) -> None:
        """Compute the chosen answers again, one by one, without cached prefixes."""
        for prompt, params, folder, tokens in self.repeats:
            await self.engine.reset_prefix_cache()
            lora = None
            if folder is not None:
                await self.engine.add_lora("again", str(folder))
                lora = LoRARequest("again")
            answer = await self.engine.complete({"prompt_token_ids": prompt}, params, lora)
            self.counts["wrong"] += answer.outputs[0].token_ids != tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--requests", type=int, help="stop after so many instead of --minutes")
    parser.add_argument("--short", action="store_true", help="requests of a few tokens each")
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--adapters", type=int, default=24)
    parser.add_argument("--ranks", type=numbers, default=[8, 16, 32, 64])
    parser.add_argument("--check", type=int, default=50, help="one in so many answers is computed again")
    parser.add_argument("--kv-cache-memory", type=int, default=64 << 20, help="bytes; so few that texts are preempted")
    parser.add_argument(
        "--checks", action="store_true", help="the engine's debug_checks: check its bookkeeping after each step"
    )
    parser.add_argument("--folder", type=Path, help="where the random adapters are; a temporary folder if not given")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(Soak(options, options.folder or Path(folder)).run())
    print(json.dumps(result))
    sys.exit(1 if result["errors"] or result["wrong"] or result["left_over"] else 0)


if __name__ == "__main__":
    main()
