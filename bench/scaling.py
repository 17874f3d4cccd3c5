"""What more cores would give: a model of the step from this machine's measured ceilings and barriers.

    python bench/scaling.py --model smollm2-135m-instruct --cores 1,2,8,16,32,64 --bandwidth 300

Each phase of a layer takes the longer of two times: its bytes over the bandwidth of the threads that have work, at
most --bandwidth GB/s, and its multiply-adds over their peak, of which --reached is reached. Threads take work in whole
units (heads, or blocks of 32 outputs, for up to 128 rows each), so a phase of 15 units takes as long on 15 cores as on
64. A barrier ends each phase; threads arrive there one after another, so it grows with their number. Measured here: one
core's read bandwidth and peak, and the barrier of all cores of this machine. Last line: one JSON document.
"""

import argparse
import json
from dataclasses import dataclass

import ceilings
from workload import numbers, say

from minilora.checkpoint.resolve import resolve_model
from minilora.loading import load_model
from minilora.model.work import rows_at_once
from minilora.weights import Weights
from minilora_kernels.jit import kernel
from minilora_kernels.limits import usable_cores
from minilora_kernels.pack import BLOCK, BLOCK_BYTES, COLUMNS, ROWS
from minilora_kernels.sync import barrier
from minilora_kernels.team import Team, team_program

MEETINGS = 2000
# A step of so many rows is taken for a prompt's: only its last row goes through the head.
PROMPT = 64


@kernel
def _meet(thread, threads, sync, times, fixed):
    for _ in range(times):
        barrier(sync, threads)


def arrival_seconds(threads: int) -> float:
    """What each thread adds to a barrier."""
    team, meet = Team(threads), team_program(_meet)
    team.run(meet, MEETINGS)
    seconds = ceilings.seconds(lambda: team.run(meet, MEETINGS))
    team.close()
    return seconds / MEETINGS / threads


@dataclass(frozen=True)
class Phase:
    """Part of a step between two barriers. units: pieces that threads can take; times: how often it is in a step."""

    name: str
    units: int
    bytes: int
    products: int
    times: int


def phases(weights: Weights, rows: int) -> list[Phase]:
    """Those of a step with `rows` rows, products with weights only: for short texts the rest is little."""
    config = weights.config
    heads, width = config.heads + 2 * config.kv_heads, config.hidden_size // BLOCK
    units = {"q k v": heads, "o": width, "gate up": config.intermediate_size // BLOCK, "down": width}
    sizes = {
        "q k v": (config.qkv_rows, config.hidden_size),
        "o": (config.hidden_size, config.heads * config.head_dim),
        "gate up": (2 * config.intermediate_size, config.hidden_size),
        "down": (config.hidden_size, config.intermediate_size),
    }
    head = weights.matrices[weights.head]
    inner = [m for i, m in enumerate(weights.matrices) if i not in (weights.embed, weights.head)]
    each = sum(int(m[ROWS] // BLOCK * m[BLOCK_BYTES]) for m in inner) / sum(int(m[ROWS] * m[COLUMNS]) for m in inner)
    blocks, logits = int(head[ROWS]) // BLOCK, rows if rows < PROMPT else 1
    # Where few logits are wanted the last layer, too, does next to nothing.
    layers = config.layers - (logits < rows)
    found = []
    for name, (n, k) in sizes.items():
        spans = -(-rows // rows_at_once.py_func(k))
        found.append(Phase(name, spans * units[name], int(n * k * each), rows * n * k, layers))
    found.append(Phase("attention", rows * config.kv_heads, 0, 0, layers))
    products = logits * int(head[ROWS] * head[COLUMNS])
    return [*found, Phase("head", blocks, blocks * int(head[BLOCK_BYTES]), products, 1)]


def predict(parts: list[Phase], cores: int, one: ceilings.Ceilings, options: argparse.Namespace, arrival: float):
    """Seconds of a step: (work, barriers)."""
    work = 0.0
    for part in parts:
        busy = part.units / -(-part.units // cores)
        reading = part.bytes / (min(busy * one.read, options.bandwidth) * 1e9)
        work += part.times * max(reading, part.products / (busy * one.multiply * 1e9 * options.reached))
    return work, sum(part.times for part in parts) * cores * arrival * (cores > 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--cores", type=numbers, default=[1, 2, 8, 16, 32, 64])
    parser.add_argument("--rows", type=numbers, default=[1, 8, 512], help="rows of a step")
    parser.add_argument("--bandwidth", type=float, default=300.0, help="read bandwidth of the whole machine, GB/s")
    parser.add_argument("--reached", type=float, default=0.65, help="share of the int8 peak that products reach")
    options = parser.parse_args()
    weights = load_model(resolve_model(options.model, say), options.model).weights
    one, arrival = ceilings.measure(1), arrival_seconds(usable_cores())
    print(
        f"one core: {one.read:.1f} GB/s read, {one.multiply:.0f} G int8 multiply-adds/s; "
        f"a barrier: {1e6 * arrival:.2f} us for each thread"
    )
    found = []
    for rows in options.rows:
        parts = phases(weights, rows)
        for cores in options.cores:
            work, waiting = predict(parts, cores, one, options, arrival)
            speed = rows / (work + waiting)
            found.append(
                {
                    "rows": rows,
                    "cores": cores,
                    "tokens_per_s": round(speed),
                    "barriers": round(waiting / (work + waiting), 3),
                }
            )
            print(f"{rows:4} rows, {cores:3} cores: {speed:10.0f} tokens/s, {found[-1]['barriers']:6.1%} in barriers")
    measured = {"read": one.read, "multiply": one.multiply, "arrival_us": 1e6 * arrival}
    print(json.dumps({"settings": vars(options), "measured": measured, "predicted": found}))


if __name__ == "__main__":
    main()
