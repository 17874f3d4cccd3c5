"""bench/serve_http.py on a tiny model, and its client and figures by themselves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

from http_client import Answer  # noqa: E402
from http_report import Outcome, most_at_once, peak_rate, spread  # noqa: E402
from llama_server import LlamaServer  # noqa: E402
from workload import Arrival  # noqa: E402

# What `vllm bench serve` writes.
KEYS = {
    "duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput",
    "request_goodput", "output_throughput", "total_token_throughput", "max_output_tokens_per_s",
    "max_concurrent_requests", "num_prompts", "request_rate", "burstiness", "max_concurrency", "model_id", "date",
    *(f"{what}_{name}_ms" for what in ("mean", "median", "std", "p50", "p95", "p99") for name in ("ttft", "tpot", "itl", "e2el")),
}  # fmt: skip


def run(*arguments):
    command = [sys.executable, BENCH / "serve_http.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


LOAD = ("--num-prompts", 8, "--random-input-len", "4-40", "--random-output-len", "2-6", "--max-model-len", 256)


def test_a_server_of_its_own_beside_the_engine(tiny, tmp_path):
    saved = tmp_path / "result.json"
    found = run(
        "--start", "--compare-engine", "--model", tiny("llama"), *LOAD, "--adapters", 3, "--ranks", "4,8",
        "--max-concurrency", 3, "--goodput", "ttft:60000", "tpot:60000", "--save-result", saved, "--save-detailed",
        "--metadata", "case=tiny",
    )  # fmt: skip
    assert set(found) >= KEYS and json.loads(saved.read_text()) == found
    assert (found["completed"], found["failed"], found["first_error"]) == (8, 0, None)
    assert found["total_output_tokens"] == sum(found["output_lens"]) and set(found["output_lens"]) <= set(range(2, 7))
    assert found["request_goodput"] == pytest.approx(8 / found["duration"])
    assert 1 <= found["max_concurrent_requests"] <= 3 and found["metadata"] == {"case": "tiny"}
    [engine] = found["runs"]["engine"]
    assert engine["requests"] == 8
    assert found["ratios"]["engine"] == pytest.approx(found["output_throughput"] / engine["output_throughput"])


def test_a_running_server_in_an_open_loop(server):
    names = ["a0", "a1"]
    common = ("--base-url", server.url, *LOAD, "--vocab-size", 200, "--request-rate", 100, "--adapters", 3)
    found = run(*common, "--lora-modules", *names)
    assert (found["completed"], found["request_rate"], found["max_concurrency"]) == (8, 100.0, None)
    assert found["num_prompts"] == 8 and len(found["runs"]["http"]) == 1
    wrong = run(*common, "--lora-modules", "a0", "nobody")
    assert wrong["failed"] == 4 == wrong["completed"] and wrong["first_error"].startswith("404: ")


def test_llama_server_never_sees_a_prompt_twice():
    server, prompts = object.__new__(LlamaServer), []
    server.complete = lambda arrival, **_: prompts.append(arrival.prompt) or 2
    server.load([Arrival(0.0, (i, i), 2, None) for i in range(5)], 2)
    assert len(prompts) == 6 == len(set(prompts))


@pytest.mark.parametrize("script", ["serve_http.py --start --llama-server x", "llama_server.py --server x --gguf y"])
def test_llama_server_has_no_open_loop(script):
    command = [sys.executable, *script.split(), "--rate", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=BENCH)
    assert done.returncode == 2 and "closed loop" in done.stderr


@pytest.mark.parametrize("option", [("--percentile-metrics", "ttft,speed"), ("--metric-percentiles", "50,101")])
def test_the_report_is_checked_before_the_load(option):
    done = subprocess.run([sys.executable, "serve_http.py", *option], capture_output=True, text=True, cwd=BENCH)
    assert done.returncode == 2 and option[0] in done.stderr


def test_events_that_come_in_pieces():
    text = b'data: {"a": 1}\r\n\r\n: ping\n\ndata: {"a": "\xc3\xa9"}\n\ndata: [DONE]\n\n'
    whole = [({"a": 1}), ({"a": "é"})]
    for size in (1, 2, 7, len(text)):
        answer = Answer(200, [(float(i), text[i : i + size]) for i in range(0, len(text), size)])
        assert [event for _, event in answer.events()] == whole, size
    assert [when for when, _ in answer.events()] == [0.0, 0.0]


def test_figures():
    one, other = Outcome(0.0, 5, 3, [0.5, 0.6, 0.9]), Outcome(0.8, 5, 1, [1.9])
    assert (one.ttft, one.e2el, one.tpot, other.tpot) == (0.5, 0.9, pytest.approx(0.2), None)
    assert one.itl == pytest.approx([0.1, 0.3])
    assert (most_at_once([one, other]), peak_rate([one, other])) == (2, 3.0)
    assert peak_rate([Outcome(0.0, 5, 16, [0.5, 0.9])]) == 16.0, "pieces hold several tokens"
    assert spread("itl", [0.1, 0.3], "50") == {
        "mean_itl_ms": 200.0, "median_itl_ms": 200.0, "std_itl_ms": 100.0, "p50_itl_ms": 200.0,
    }  # fmt: skip
