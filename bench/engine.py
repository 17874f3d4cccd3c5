"""The engine's speed: prefill and decoding of several texts side by side, with and without adapters.

    python bench/engine.py --model M --prompt 512 --generate 64 --batch 1,8 --adapters 0,8 --rank 16 [--json]

ppN: one prompt of N tokens, prompt tokens per second. tgN: `batch` texts that decode N tokens each, after prompts of
--depth tokens, which are not timed; new tokens of all of them per second. The i-th text has the (i mod adapters)-th
adapter, each on all linear layers. Medians of --repeats runs after one to warm up. Last line: one JSON document.
"""

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version

import numpy as np
import psutil
from workload import adapter_tensors, numbers, say

from minilora.checkpoint.resolve import resolve_model
from minilora.engine import Engine
from minilora.loading import load_model
from minilora.params import EngineConfig, SamplingParams
from minilora.peft import adapter_from_arrays
from minilora.plan import Target
from minilora.sequence import AdapterUse
from minilora_kernels import cpu

DEPTH = 128


class Bench:
    def __init__(self, options: argparse.Namespace):
        model = load_model(resolve_model(options.model, say), options.model, Target(options.dtype, options.group_size))
        self.config, self.options, self.weights = model.weights.config, options, model.weights
        engine = EngineConfig(
            max_model_len=min(self.config.max_position_embeddings, longest(options)),
            max_num_seqs=max(options.batch),
            max_num_batched_tokens=options.budget,
            max_step_ms=None,
            threads=options.threads,
            max_loras=max(*options.adapters, 1),
            max_lora_rank=options.rank,
            enable_prefix_caching=False,
            # Plain steps are measured; random prompts give texts that loop, whose draft tokens are mostly right.
            num_speculative_tokens=0,
            kv_cache_dtype=options.kv_cache_dtype,
            lora_dtype=options.lora_dtype,
        )
        self.engine = Engine(model.weights, engine)
        settings = {"r": options.rank, "lora_alpha": options.rank}
        self.versions = [
            self.engine.add_adapter(
                adapter_from_arrays(adapter_tensors(self.config, options.rank, seed), settings, self.config)
            )
            for seed in range(max(options.adapters))
        ]
        self.rng = np.random.default_rng(1)

    def uses(self, i: int, adapters: int) -> tuple[AdapterUse, ...]:
        return (AdapterUse(self.versions[i % adapters], 1.0),) if adapters else ()

    def tokens(self, count: int) -> list[int]:
        return self.rng.integers(0, self.config.vocab_size, count).tolist()

    def prefill(self, adapters: int) -> float:
        """Prompt tokens per second of one prompt."""
        params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
        self.engine.submit(self.tokens(self.options.prompt), params, self.uses(0, adapters))
        started = time.perf_counter()
        while self.engine.busy:
            self.engine.step()
        return self.options.prompt / (time.perf_counter() - started)

    def decode(self, batch: int, adapters: int) -> float:
        """New tokens per second of `batch` texts while all of them decode; their prompts are done one after another."""
        params = SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)
        sequences = []
        for i in range(batch):
            sequences += self.engine.submit(self.tokens(self.options.depth), params, self.uses(i, adapters))
        while any(sequence.generated == 0 for sequence in sequences):
            self.engine.step()
        before = sum(sequence.generated for sequence in sequences)
        enough = before + batch * self.options.generate
        started = time.perf_counter()
        while (tokens := sum(sequence.generated for sequence in sequences)) < enough and self.engine.busy:
            self.engine.step()
        seconds = time.perf_counter() - started
        for sequence in sequences:
            self.engine.cancel(sequence)
        return (tokens - before) / seconds

    def rows(self):
        """(test, batch, adapters, what to run), in the order of the report."""
        for adapters in self.options.adapters:
            yield f"pp{self.options.prompt}", 1, adapters, lambda adapters=adapters: self.prefill(adapters)
            for batch in self.options.batch:
                yield (
                    f"tg{self.options.generate}",
                    batch,
                    adapters,
                    lambda batch=batch, adapters=adapters: self.decode(batch, adapters),
                )


def longest(options: argparse.Namespace) -> int:
    """Tokens that a text may have: the first of a batch decode while the prompts of the others are still prefilled."""
    prefill_steps = max(options.batch) * options.depth // options.budget
    return options.depth + options.prompt + options.generate + prefill_steps + EngineConfig.num_scheduler_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto", help="number format of the weights")
    parser.add_argument(
        "--group-size", type=int, default=32, help="weights that share a scale, with --dtype int8 or int4"
    )
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens of ppN")
    parser.add_argument("--generate", type=int, default=64, help="new tokens of tgN, of each text")
    parser.add_argument("--batch", type=numbers, default=[1, 8], help="texts side by side, e.g. 1,8")
    parser.add_argument("--adapters", type=numbers, default=[0, 8], help="how many adapters, e.g. 0,8")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--depth", type=int, default=DEPTH, help="prompt tokens of tgN, not timed")
    parser.add_argument("--budget", type=int, default=512, help="rows of a step at most")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--lora-dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    options = parser.parse_args()
    bench = Bench(options)
    rows = []
    for test, batch, adapters, run in bench.rows():
        run()
        samples = [run() for _ in range(options.repeats)]
        rows.append(
            {
                "test": test,
                "batch": batch,
                "adapters": adapters,
                "tokens_per_s": statistics.median(samples),
                "samples": samples,
            }
        )
        if not options.json:
            print(
                f"{test:8} batch {batch:3} adapters {adapters:3} {rows[-1]['tokens_per_s']:10.1f} tokens/s", flush=True
            )
    machine = {
        "cpu": cpu.target()[1],
        "family": cpu.family(),
        "threads": bench.engine.runner.team.size,
        "platform": platform.platform(),
        "load": psutil.getloadavg()[0],
        **{name: version(name) for name in ("numpy", "numba", "llvmlite")},
    }
    settings = {k: v for k, v in vars(options).items() if k != "json"}
    print(json.dumps({"settings": settings, "machine": machine, "bytes": len(bench.weights.arena), "rows": rows}))


if __name__ == "__main__":
    main()
