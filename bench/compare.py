"""minilora beside llama.cpp: the same models on as many threads, in turn.

    python bench/compare.py --llama-bin DIR [--pairs 5] [--only decode] [--results bench/results/CPU.json]

DIR holds llama.cpp's llama-bench, llama-batched-bench, llama-quantize and llama-server. Each case has a model file for
us and one for llama.cpp, whose flash attention is on or off, whichever a few runs show to be faster (on for an int8
KV cache, which needs it there). Then both run in turn, --pairs times, now one first and now the other; the ratio is the
median of the pairs' ratios.
Decoding is timed without its prompts on both sides. Beside our figure stands its share of this machine's ceiling:
measured read bandwidth over the bytes of a token, or the measured int8 peak over its multiply-adds. Random weights in
larger shapes are made under --work. Last line: one JSON document, also written to --results.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import ceilings
from engine import Bench
from workload import say

from minilora.checkpoint.resolve import resolve_model
from minilora_kernels import cpu
from minilora_kernels.limits import usable_cores
from minilora_kernels.pack import BLOCK, BLOCK_BYTES, COLUMNS, ROWS

ROOT = Path(__file__).resolve().parent.parent
SMALL = "smollm2-135m-instruct"
PROMPT = 512
# Runs of each setting of flash attention, to find llama.cpp's better one.
TRIALS = 3
# Above this load for each thread the ratios are not to be trusted.
BUSY = 0.5
PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-quantize", "llama-server")
# Random weights in these shapes, by the first word of a file's key. tools/random_gguf.py makes these of the types,
# llama-quantize makes all others of float16.
SHAPES, MADE = {"big": "tinyllama-1.1b", "wide": "llama-3.2-1b"}, ("q4_0", "q8_0", "f16")


@dataclass(frozen=True)
class Case:
    """A row of the table. ours, theirs: keys of Files; test: what Bench runs; target: the ratio to reach.

    cache: both sides' KV cache format; depth: tokens before the first new one; dtype: of our weights.
    """

    name: str
    ours: str
    theirs: str
    test: str
    target: float
    batch: int = 1
    adapters: int = 0
    depth: int = 128
    cache: str = "float16"
    dtype: str = "auto"


CASES = [
    Case("prefill 512, 135M Q4_1, against Q4_0", "small", "small-q4_0", "prefill", 1.8),
    Case("prefill 512, 135M Q4_1, same file", "small", "small", "prefill", 6),
    Case("prefill 512, 135M Q4_0, same file", "small-q4_0", "small-q4_0", "prefill", 1.8),
    Case("prefill 512, 1.1B int4, against Q4_0", "big-q4_0", "big-q4_0", "prefill", 1.6),
    Case("prefill 512, 1.1B int8, against Q8_0", "big-q8_0", "big-q8_0", "prefill", 2.8),
    Case("prefill 512, Llama-3.2-1B int4, against Q4_0", "wide-q4_0", "wide-q4_0", "prefill", 1.6),
    Case("prefill 512, Llama-3.2-1B int8, against Q8_0", "wide-q8_0", "wide-q8_0", "prefill", 2.8),
    Case("decode, 135M Q4_1, against Q4_0", "small", "small-q4_0", "decode", 1.5),
    Case("decode, 135M Q4_1, same file", "small", "small", "decode", 2),
    Case("decode, 135M Q4_0, same file", "small-q4_0", "small-q4_0", "decode", 1.5),
    Case("decode, 1.1B int4, against Q4_0", "big-q4_0", "big-q4_0", "decode", 1.05),
    Case("decode, Llama-3.2-1B int4, against Q4_0", "wide-q4_0", "wide-q4_0", "decode", 1.05),
    Case("prefill 512, 1.1B Q4_K_M, same file", "big-q4_k_m", "big-q4_k_m", "prefill", 1.1),
    Case("prefill 512, 1.1B Q6_K, same file", "big-q6_k", "big-q6_k", "prefill", 1.1),
    Case("prefill 512, 1.1B BF16, same file", "big-bf16", "big-bf16", "prefill", 1.1),
    Case("prefill 512, 1.1B BF16, inputs rounded", "big-bf16", "big-bf16", "prefill", 1.1, dtype="bfloat16+inputs"),
    Case("decode, 1.1B Q4_K_M, same file", "big-q4_k_m", "big-q4_k_m", "decode", 1.05),
    Case("decode, 1.1B Q6_K, same file", "big-q6_k", "big-q6_k", "decode", 1.05),
    Case("decode, 1.1B BF16, same file", "big-bf16", "big-bf16", "decode", 1.05),
    Case("decode, 1.1B BF16, inputs rounded", "big-bf16", "big-bf16", "decode", 1.05, dtype="bfloat16+inputs"),
    Case("decode batch 8, 135M Q4_1, against Q4_0", "small", "small-q4_0", "decode", 3, batch=8),
    Case("decode batch 8, 135M Q4_0, same file", "small-q4_0", "small-q4_0", "decode", 3, batch=8),
    Case("decode at depth 4096, 135M, float16 pages", "small", "small-q4_0", "decode", 2.5, depth=4096),
    Case("decode at depth 4096, 135M, int8 pages", "small", "small-q4_0", "decode", 3, depth=4096, cache="int8"),
    Case("decode batch 8, 8 adapters, against llama-server", "small", "small-q4_0", "decode", 8, batch=8, adapters=8),
]

WIDTH = max(len(case.name) for case in CASES)


class Files:
    """Model files by key, made or fetched when first asked for."""

    def __init__(self, work: Path, binaries: Path):
        self._work, self._binaries = work, binaries
        work.mkdir(parents=True, exist_ok=True)

    def __getitem__(self, key: str) -> Path:
        if key == "small":
            return Path(resolve_model(SMALL, say))
        path = self._work / f"{key}.gguf"
        if not path.exists():
            (model, kind), part = key.split("-"), path.with_suffix(".part")
            if model in SHAPES and kind in MADE:
                run([sys.executable, ROOT / "tools" / "random_gguf.py", SHAPES[model], kind, part])
            else:
                source = self[f"{model}-f16" if model in SHAPES else model]
                run([self._binaries / "llama-quantize", "--allow-requantize", source, part, kind.upper(), "2"])
            part.rename(path)
        return path


def run(command: list) -> str:
    """A program's stdout. Raises SystemExit where it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


class Llama:
    """llama.cpp's speed in a case, tokens per second."""

    def __init__(self, case: Case, file: Path, binaries: Path, threads: int):
        self.case, self.file, self.binaries, self.threads = case, file, binaries, threads
        self.flash = self._better() if case.cache == "float16" else 1

    def speed(self) -> float:
        """One measurement with the better setting of flash attention."""
        return self._speed(self.flash)

    def _better(self) -> int:
        """The faster setting of flash attention, by the medians of TRIALS runs of each, in turn."""
        speeds = [[self._speed(flash) for flash in (0, 1)] for _ in range(TRIALS)]
        off, on = (statistics.median(column) for column in zip(*speeds, strict=True))
        return int(on >= off)

    def _speed(self, flash: int) -> float:
        if self.case.adapters:
            return self._served(flash)
        return self._batched(flash) if self.case.batch > 1 else self._single(flash)

    def _single(self, flash: int) -> float:
        case = self.case
        command = [self.binaries / "llama-bench", "-m", self.file, "-t", self.threads, "-fa", flash, "-o", "json"]
        command += ["-p", PROMPT, "-n", 0] if case.test == "prefill" else ["-p", 0, "-n", 48, "-d", case.depth]
        command += ["-r", 3] + (["-ctk", "q8_0", "-ctv", "q8_0"] if case.cache == "int8" else [])
        return statistics.median(json.loads(run(command))[0]["samples_ts"])

    def _batched(self, flash: int) -> float:
        case = self.case
        command = [self.binaries / "llama-batched-bench", "-m", self.file, "-t", self.threads, "-c", 4096]
        command += ["-npp", case.depth, "-ntg", 64, "-npl", case.batch, "-fa", "on" if flash else "off"]
        command += ["--output-format", "jsonl"]
        rows = [line for line in run(command).splitlines() if line.startswith("{")]
        return json.loads(rows[-1])["speed_tg"]

    def _served(self, flash: int) -> float:
        case = self.case
        command = [sys.executable, ROOT / "bench" / "llama_server.py", "--server", self.binaries / "llama-server"]
        command += ["--gguf", self.file, "--adapters", case.adapters, "--concurrency", case.batch, "--repeats", 1]
        command += ["--prompt", case.depth, "--generate", 64, "--threads", self.threads, "--decode"]
        command += ["--server-arguments", f"-fa {'on' if flash else 'off'}"]
        found = json.loads(run(command).splitlines()[-1])
        return found["rows"][0]["llama_server"]


class Ours:
    """Our speed in a case, tokens per second; the engine stays open between measurements, its threads asleep."""

    def __init__(self, case: Case, file: Path, threads: int):
        self.case = case
        self.bench = Bench(
            argparse.Namespace(
                model=str(file),
                dtype=case.dtype,
                group_size=32,
                prompt=PROMPT,
                generate=64,
                depth=case.depth,
                batch=[case.batch],
                adapters=[case.adapters],
                rank=16,
                budget=PROMPT,
                threads=threads,
                kv_cache_dtype=case.cache,
                lora_dtype="auto",
            )
        )
        self.speed()

    def speed(self) -> float:
        """One measurement."""
        if self.case.test == "prefill":
            return statistics.median(self.bench.prefill(0) for _ in range(3))
        return self.bench.decode(self.case.batch, self.case.adapters)

    def ceiling(self, found: ceilings.Ceilings) -> float:
        """The speed that the machine's peak allows: of reading bytes, or for prompts of int8 multiply-adds.

        Attention's count at the same peak, though it computes in float32 (operations as in Chowdhery et al. 2022,
        arXiv:2204.02311, appendix B).
        """
        config, weights, case = self.bench.config, self.bench.weights, self.case
        ends = {weights.embed, weights.head}
        if case.test == "prefill":
            # The embedding is looked up; the head, and the last layer but for keys and values, see one row of a prompt.
            numbers = sum(int(m[ROWS] * m[COLUMNS]) for i, m in enumerate(weights.matrices) if i not in ends)
            layers, seen = config.layers - 1, (PROMPT + 1) / 2
            attention = 2 * layers * config.heads * config.head_dim * seen
            last = 2 * config.kv_heads * config.head_dim * config.hidden_size
            return found.multiply * 1e9 / (numbers * layers / config.layers + last + attention)
        token = {"float16": 2, "int8": 1}[case.cache] * 2 * config.layers * config.kv_heads * config.head_dim
        read = len(weights.arena) + case.batch * token * case.depth + self.bench.engine.runner.adapter_pool.used
        if weights.embed != weights.head:
            embed = weights.matrices[weights.embed]
            read -= int(embed[ROWS] // BLOCK * embed[BLOCK_BYTES])
        return case.batch * found.read * 1e9 / read

    def close(self) -> None:
        self.bench.engine.close()


def compare(case: Case, files: Files, options: argparse.Namespace, tell: Callable[[str], None]) -> dict:
    """One row of the table."""
    ours = Ours(case, files[case.ours], options.threads)
    theirs = Llama(case, files[case.theirs], options.llama_bin, options.threads)
    rounds = []
    for i in range(options.pairs):
        ceiling = ours.ceiling(ceilings.measure(options.threads))
        sides = (ours, theirs) if i % 2 == 0 else (theirs, ours)
        speeds = {side: side.speed() for side in sides}
        rounds.append((ceiling, speeds[ours], speeds[theirs]))
    ratios = sorted(mine / other for _, mine, other in rounds)
    shares = [mine / ceiling for ceiling, mine, _ in rounds]
    _, mine, other = (statistics.median(column) for column in zip(*rounds, strict=True))
    row = {
        "case": case.name,
        "minilora": round(mine, 1),
        "llama.cpp": round(other, 1),
        "ratio": round(statistics.median(ratios), 2),
        "lowest": round(ratios[0], 2),
        "highest": round(ratios[-1], 2),
        "target": case.target,
        "of_ceiling": round(statistics.median(shares), 3),
        "flash_attention": bool(theirs.flash),
    }
    ours.close()
    tell(
        f"{case.name:{WIDTH}} {mine:9.1f} {other:9.1f} {row['ratio']:6.2f} {row['lowest']:7.2f} {row['highest']:8.2f}"
        f" {case.target:7.2f} {row['of_ceiling']:11.0%}"
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-bin", type=Path, required=True, help="folder with llama.cpp's programs")
    parser.add_argument("--llama-name", default="", help="which llama.cpp it is, for the report")
    parser.add_argument("--work", type=Path, default=Path("bench-models"), help="folder for the files that are made")
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each side")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--results", type=Path, help="write the JSON document here too")
    parser.add_argument("--json", action="store_true", help="print the JSON document only")
    options = parser.parse_args()
    cases = [case for case in CASES if options.only in case.name]
    if not cases:
        parser.error(f"no case's name contains {options.only!r}")
    if missing := [name for name in PROGRAMS if not (options.llama_bin / name).exists()]:
        parser.error(f"{options.llama_bin} has no {', '.join(missing)}: build llama.cpp there")
    if (load := os.getloadavg()[0]) > BUSY * options.threads:
        say(f"load {load:.1f} at the start: programs that want the cores slow llama.cpp down more than us")
    tell = (lambda line: None) if options.json else lambda line: print(line, flush=True)
    files = Files(options.work, options.llama_bin)
    tell(
        f"{'tokens/s':{WIDTH}} {'minilora':>9} {'llama.cpp':>9} {'ratio':>6} {'lowest':>7} {'highest':>8} {'target':>7}"
        f" {'of ceiling':>11}"
    )
    rows: list[dict] = []
    for case in cases:
        rows.append(compare(case, files, options, tell))
        document = json.dumps({"about": about(options), "rows": rows})
        # After each row: a later one may fail.
        if options.results:
            options.results.write_text(document + "\n")
    print(document)


def about(options: argparse.Namespace) -> dict:
    """What the figures depend on."""
    peak = ceilings.measure(options.threads)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu.target()[1],
        "family": cpu.family(),
        "threads": options.threads,
        "python": platform.python_version(),
        **{name: version(name) for name in ("minilora", "numpy", "numba", "llvmlite")},
        "llama.cpp": options.llama_name,
        "read_gb_per_s": round(peak.read, 1),
        "multiply_g_per_s": round(peak.multiply),
        "pairs": options.pairs,
    }


if __name__ == "__main__":
    main()
