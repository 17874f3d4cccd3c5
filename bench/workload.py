"""What benchmarks feed engines and servers: requests with seeded lengths, arrival times and adapters.

The same seed gives the same requests, whoever serves them.
"""

import argparse
import csv
import json
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from minilora.adapters import module_shapes
from minilora.config import ModelConfig

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj")


@dataclass(frozen=True)
class Arrival:
    """A request. at: seconds after the start, 0 in a closed loop; adapter: its number or None."""

    at: float
    prompt: tuple[int, ...]
    generate: int
    adapter: int | None


def say(message: str) -> None:
    """Print what is not a result."""
    print(message, file=sys.stderr)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that describe a workload; second names are `vllm bench serve`'s."""
    parser.add_argument("--requests", "--num-prompts", type=int, default=24, help="at most, with --trace")
    parser.add_argument(
        "--concurrency", "--max-concurrency", type=int, default=8, help="closed loop: requests in flight at any time"
    )
    arrival = parser.add_mutually_exclusive_group()
    arrival.add_argument("--rate", "--request-rate", type=float, help="open loop: requests per second")
    parser.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        help="with --rate: gamma shape of the gaps; 1 is Poisson, less is burstier",
    )
    parser.add_argument("--prompt", "--random-input-len", type=span, default=(128, 128), help="tokens, N or LOW-HIGH")
    parser.add_argument("--generate", "--random-output-len", type=span, default=(64, 64), help="tokens, N or LOW-HIGH")
    arrival.add_argument(
        "--trace", type=Path, help="open loop: CSV of arrival time, prompt and output tokens, instead of the ranges"
    )
    parser.add_argument("--adapters", type=int, default=8, help="registered adapters; 0 for the base model alone")
    parser.add_argument("--popularity", default="distinct", help="distinct, identical, uniform, zipf:S or power:ALPHA")
    parser.add_argument("--ranks", type=numbers, default=[16], help="ranks of the adapters in turn, e.g. 8,16,32,64")
    parser.add_argument("--seed", type=int, default=1)


def span(text: str) -> tuple[int, int]:
    """ "128" or "64-256" as (low, high)."""
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def numbers(text: str) -> list[int]:
    """ "8,16" as numbers."""
    return [int(part) for part in text.split(",")]


def draw_adapters(popularity: str, adapters: int, requests: int, rng: np.random.Generator) -> list[int | None]:
    """Which adapter each request uses.

    distinct: each in turn; identical: the first; zipf:S: the k-th with probability proportional to k^-S; power:ALPHA:
    as S-LoRA draws (arXiv:2311.03285), number n * U^(1 / ALPHA).
    """
    if adapters == 0:
        return [None] * requests
    kind, _, value = popularity.partition(":")
    if kind == "distinct":
        return [i % adapters for i in range(requests)]
    if kind == "identical":
        return [0] * requests
    if kind == "uniform":
        return rng.integers(adapters, size=requests).tolist()
    if kind == "zipf":
        weights = np.arange(1, adapters + 1) ** -float(value or 1)
        return rng.choice(adapters, requests, p=weights / weights.sum()).tolist()
    if kind == "power":
        return (rng.power(float(value or 1), requests) * adapters).astype(int).tolist()
    raise SystemExit(f"--popularity {popularity}: not one of distinct, identical, uniform, zipf:S, power:ALPHA")


def read_trace(path: Path, requests: int) -> list[tuple[float, int, int]]:
    """(seconds, prompt tokens, output tokens) of a trace's first requests, of fewer where it is shorter."""
    rows = []
    with path.open(newline="") as file:
        for row in csv.reader(file):
            if len(rows) == requests:
                break
            if row and row[1].isdecimal():
                at = datetime.fromisoformat(row[0][:26]).timestamp() if not _is_number(row[0]) else float(row[0])
                rows.append((at, int(row[1]), int(row[2])))
    if not rows:
        raise SystemExit(f"{path} has no row of arrival time, prompt and output tokens")
    start = rows[0][0]
    return [(at - start, prompt, generate) for at, prompt, generate in rows]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def make_arrivals(options: argparse.Namespace, vocabulary: int, most: int) -> list[Arrival]:
    """The requests, none longer than `most` tokens."""
    rng = np.random.default_rng(options.seed)
    sizes = read_trace(options.trace, options.requests) if options.trace else []
    count = len(sizes) if options.trace else options.requests
    chosen = draw_adapters(options.popularity, options.adapters, count, rng)
    if not options.trace:
        prompts = rng.integers(options.prompt[0], options.prompt[1] + 1, count)
        texts = rng.integers(options.generate[0], options.generate[1] + 1, count)
        gaps = (
            rng.gamma(options.burstiness, 1 / (options.burstiness * options.rate), count)
            if options.rate
            else [0.0] * count
        )
        sizes = list(zip(np.cumsum(gaps).tolist(), prompts.tolist(), texts.tolist(), strict=True))
    arrivals = []
    for (at, prompt, generate), adapter in zip(sizes, chosen, strict=True):
        length = max(1, min(prompt, most - 2))
        tokens = tuple(rng.integers(3, vocabulary, length).tolist())
        arrivals.append(Arrival(at, tokens, max(1, min(generate, most - length - 1)), adapter))
    return arrivals


def adapter_tensors(config: ModelConfig, rank: int, seed: int) -> dict[str, np.ndarray]:
    """Random float16 tensors under PEFT's names for all linear layers; the update is 0.2% of SmolLM2's weights."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, (rows, columns) in module_shapes(config).items():
        if name.endswith(LINEAR):
            a, b = rng.standard_normal((rank, columns), np.float32), rng.standard_normal((rows, rank), np.float32)
            tensors[f"base_model.model.{name}.lora_A.weight"] = (a * np.float32(0.05 / columns**0.5)).astype(np.float16)
            tensors[f"base_model.model.{name}.lora_B.weight"] = (b * np.float32(0.05)).astype(np.float16)
    return tensors


def save_random_adapter(folder: Path, config: ModelConfig, rank: int, seed: int) -> Path:
    """A PEFT folder of such tensors, made once."""
    if not (folder / "adapter_config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        targets = sorted({name.rsplit(".", 1)[-1] for name in module_shapes(config) if name.endswith(LINEAR)})
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "bias": "none"}
        save_file(adapter_tensors(config, rank, seed), folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
