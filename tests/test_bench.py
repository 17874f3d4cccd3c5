"""The benchmark scripts run on a tiny model and end with one JSON document."""

import argparse
import itertools
import json
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from minilora.loading import load_model

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))

import engine  # noqa: E402
import scaling  # noqa: E402
from soak import by_tenth  # noqa: E402
from workload import draw_adapters, make_arrivals, read_trace, span  # noqa: E402


def last_line(script, *arguments):
    done = subprocess.run([sys.executable, BENCH / script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_engine(tiny):
    found = last_line(
        "engine.py", "--model", tiny("llama"), "--prompt", 40, "--generate", 4, "--batch", "1,2", "--adapters", "0,2",
        "--rank", 4, "--repeats", 1, "--depth", 8,
    )  # fmt: skip
    rows = {(row["test"], row["batch"], row["adapters"]) for row in found["rows"]}
    assert rows == {("pp40", 1, a) for a in (0, 2)} | {("tg4", b, a) for b in (1, 2) for a in (0, 2)}


def test_decoding_counts_while_all_texts_do(tiny, monkeypatch):
    given = {
        "model": tiny("llama"), "dtype": "auto", "group_size": 32, "prompt": 20, "generate": 6, "depth": 8, "batch": [4],
        "adapters": [0], "rank": 4, "budget": 8, "threads": 1, "kv_cache_dtype": "auto", "lora_dtype": "auto",
    }  # fmt: skip
    bench = engine.Bench(argparse.Namespace(**given))
    monkeypatch.setattr(engine, "time", types.SimpleNamespace(perf_counter=itertools.count().__next__))
    tokens = bench.decode(4, 0)  # in one second of this clock
    bench.engine.close()
    assert tokens >= 4 * 6 and tokens % 4 == 0


def test_kernels():
    found = last_line("kernels.py", "--only", "merge_parts")
    [row] = found["rows"]
    assert (
        row["case"] == "merge_parts" and row["us"] > 0 and row["read_percent"] > 0 and found["ceilings"]["multiply"] > 0
    )


@pytest.mark.parametrize("mode", [[], ["--rate", 200, "--burstiness", 0.5]], ids=["closed", "open"])
def test_serving(tiny, mode):
    other = "adapters=0 prompt=4-8 preload threads=1"
    found = last_line(
        "serving.py", "--model", tiny("llama"), "--max-model-len", 256, "--requests", 12, "--prompt", "4-40",
        "--generate", "2-6", "--adapters", 6, "--popularity", "zipf:1", "--ranks", "4,8", "--compare", other,
        *mode,
    )  # fmt: skip
    [run], [bare] = found["runs"]["asked"], found["runs"][other]
    assert run["requests"] == bare["requests"] == 12 and run["output_tokens_per_s"] > 0
    assert set(run["ttft_ms"]) == {"mean", "p50", "p95", "p99"} and run["adapter_loads"] > 0 == bare["adapter_loads"]
    assert found["ratios"][other] > 0


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_lookup(tiny, tmp_path, suffix):
    text = "All that is said here is said here once more, and here is all that is said. " * 9
    file = tmp_path / f"prompts.{suffix}"
    file.write_text(json.dumps({"turns": [text, "And then?"]}) if suffix == "jsonl" else f"Short.\n{text}\n")
    found = last_line("lookup.py", file, "--model", tiny("llama"), "--generate", 20, "--pairs", 1, "--batch", "1,2")
    assert [row["batch"] for row in found["rows"]] == [1, 2] and all(row["plain"] > 0 for row in found["rows"])


def test_soak(tiny):
    found = last_line(
        "soak.py", "--model", tiny("llama"), "--requests", 60, "--short", "--checks", "--check", 5, "--adapters", 4
    )
    assert found["errors"] == found["wrong"] == found["left_over"] == 0 and found["repeated"] > 0


def test_threads_share_long_prompts_by_rows_too(tiny):
    path = tiny("llama")
    weights = load_model(path, str(path)).weights
    one, many = ({part.name: part.units for part in scaling.phases(weights, rows)} for rows in (1, 512))
    assert {name: many[name] // units for name, units in one.items()} == {
        "q k v": 4, "o": 4, "gate up": 4, "down": 4, "attention": 512, "head": 1,
    }  # fmt: skip


def test_every_tenth_of_a_run_is_shown():
    assert by_tenth([float(i) for i in range(19)]) == [1, 3, 5, 7, 9, 11, 13, 15, 17, 18], "up to the last"
    assert by_tenth([5.0, 7.04]) == [5, 7]


def options(**given):
    defaults = {
        "requests": 500, "rate": None, "burstiness": 1.0, "prompt": (8, 16), "generate": (1, 4), "trace": None,
        "adapters": 20, "popularity": "zipf:1", "seed": 1,
    }  # fmt: skip
    return argparse.Namespace(**{**defaults, **given})


def test_workloads_are_what_they_say(tmp_path):
    one, same, other = (make_arrivals(options(seed=seed), 100, 64) for seed in (1, 1, 2))
    assert one == same != other
    assert all(8 <= len(a.prompt) <= 16 and 1 <= a.generate <= 4 for a in one)
    arrivals = make_arrivals(options(requests=4000, rate=50.0, burstiness=0.25), 100, 64)
    gaps = np.diff([0.0, *(a.at for a in arrivals)])
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.15) and gaps.std() / gaps.mean() == pytest.approx(2, rel=0.15)
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,Context,Generated\n2023-11-16 18:15:46.68059,374,44\n2023-11-16 18:15:48.18059,5,9\n")
    assert read_trace(trace, 5) == [(0.0, 374, 44), (1.5, 5, 9)]
    assert [len(a.prompt) for a in make_arrivals(options(trace=trace), 100, 64)] == [62, 5], "shorter than --requests"
    assert span("3") == (3, 3) and span("3-5") == (3, 5)


@pytest.mark.parametrize(
    "popularity, share", [("zipf:1", 0.28), ("uniform", 0.05), ("identical", 1.0), ("distinct", 0.05)]
)
def test_popularity(popularity, share):
    drawn = Counter(draw_adapters(popularity, 20, 20000, np.random.default_rng(1)))
    assert drawn[0] / 20000 == pytest.approx(share, abs=0.02)
    assert set(draw_adapters("power:1", 20, 1000, np.random.default_rng(1))) <= set(range(20))
