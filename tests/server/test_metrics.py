"""/metrics: vLLM's names and labels, figures that agree with the answers, and no way for clients to make it grow."""

import asyncio
import contextlib
import threading
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from minilora import AsyncEngine
from minilora.server import ServerConfig, create_app, metrics
from minilora.server.metrics import Metrics
from minilora.stats import FIRST_TOKEN_SECONDS, REQUEST_SECONDS, TOKEN_SECONDS

from .conftest import SIZES
from .raw import HOST, ask, ask_async, json_headers

BOTH = {"model_name", "engine"}
GAUGE, COUNTER, HISTOGRAM = "gauge", "counter", "histogram"

# vLLM's metrics as its gateways and dashboards read them: name -> (type, labels).
EXPECTED = {
    "vllm:num_requests_running": (GAUGE, BOTH),
    "vllm:num_requests_waiting": (GAUGE, BOTH),
    "vllm:num_requests_waiting_by_reason": (GAUGE, BOTH | {"reason"}),
    "vllm:kv_cache_usage_perc": (GAUGE, BOTH),
    "vllm:prefix_cache_queries": (COUNTER, BOTH),
    "vllm:prefix_cache_hits": (COUNTER, BOTH),
    "vllm:num_preemptions": (COUNTER, BOTH),
    "vllm:prompt_tokens": (COUNTER, BOTH),
    "vllm:prompt_tokens_cached": (COUNTER, BOTH),
    "vllm:generation_tokens": (COUNTER, BOTH),
    "vllm:spec_decode_num_drafts": (COUNTER, BOTH),
    "vllm:spec_decode_num_draft_tokens": (COUNTER, BOTH),
    "vllm:spec_decode_num_accepted_tokens": (COUNTER, BOTH),
    "vllm:request_success": (COUNTER, BOTH | {"finished_reason"}),
    "vllm:admission_rejections": (COUNTER, BOTH | {"reason"}),
    "vllm:iteration_tokens_total": (HISTOGRAM, BOTH),
    "vllm:request_prompt_tokens": (HISTOGRAM, BOTH),
    "vllm:request_generation_tokens": (HISTOGRAM, BOTH),
    "vllm:request_params_n": (HISTOGRAM, BOTH),
    "vllm:request_params_max_tokens": (HISTOGRAM, BOTH),
    "vllm:request_num_preemptions": (HISTOGRAM, BOTH),
    "vllm:time_to_first_token_seconds": (HISTOGRAM, BOTH),
    "vllm:inter_token_latency_seconds": (HISTOGRAM, BOTH),
    "vllm:request_time_per_output_token_seconds": (HISTOGRAM, BOTH),
    "vllm:e2e_request_latency_seconds": (HISTOGRAM, BOTH),
    "vllm:request_queue_time_seconds": (HISTOGRAM, BOTH),
    "vllm:request_prefill_time_seconds": (HISTOGRAM, BOTH),
    "vllm:request_decode_time_seconds": (HISTOGRAM, BOTH),
    "vllm:request_inference_time_seconds": (HISTOGRAM, BOTH),
    "vllm:cache_config_info": (GAUGE, {"engine", "block_size", "num_gpu_blocks"}),
    "vllm:lora_requests_info": (GAUGE, {"max_lora", "waiting_lora_adapters", "running_lora_adapters"}),
}


class Document:
    """A parsed /metrics."""

    def __init__(self, text):
        self.families = {family.name: family for family in text_string_to_metric_families(text)}
        self.samples = [sample for family in self.families.values() for sample in family.samples]
        self.series = {(s.name, frozenset(s.labels.items())) for s in self.samples}
        assert len(self.series) == len(self.samples), "a series is there twice"

    def __getitem__(self, name):
        """The value of the one series of this name."""
        return self.value(name)

    def value(self, name, **labels):
        """The value of the one series of this name with these labels."""
        found = [s.value for s in self.samples if s.name == name and labels.items() <= s.labels.items()]
        assert len(found) == 1, (name, labels, found)
        return found[0]


def read(server):
    answer = server.client.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=")
    return Document(answer.text)


def complete(server, **fields):
    fields = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 6, "ignore_eos": True, **fields}
    answer = server.client.post("/v1/completions", json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


# ---------------------------------------------------------------- names and figures


def test_the_names_and_labels_are_vllms(server):
    complete(server)
    document = read(server)
    for name, (kind, labels) in EXPECTED.items():
        family = document.families[name]
        assert family.type == kind, name
        for sample in family.samples:
            assert sample.labels.keys() - {"le"} == labels, sample
            assert sample.labels.get("model_name", "tiny") == "tiny" and sample.labels.get("engine", "0") == "0"
            suffix = sample.name.removeprefix(name)
            assert suffix in {GAUGE: ("",), COUNTER: ("_total",), HISTOGRAM: ("_bucket", "_count", "_sum")}[kind]
    assert all(name.startswith(("vllm:", "minilora:")) for name in document.families)
    assert {name for name in document.families if name.startswith("vllm:")} == EXPECTED.keys()


def test_histograms_are_whole(server):
    complete(server)
    document = read(server)
    for name, (kind, _) in EXPECTED.items():
        if kind != HISTOGRAM:
            continue
        buckets = [(s.labels["le"], s.value) for s in document.families[name].samples if s.name == f"{name}_bucket"]
        assert [float(bound) for bound, _ in buckets] == sorted(float(bound) for bound, _ in buckets), name
        assert [count for _, count in buckets] == sorted(count for _, count in buckets), name
        assert buckets[-1] == ("+Inf", document[f"{name}_count"]) and document[f"{name}_sum"] >= 0
    bounds = {s.labels["le"] for s in document.families["vllm:time_to_first_token_seconds"].samples if "le" in s.labels}
    assert {"0.001", "1.0", "2560.0"} <= bounds


def test_vllms_buckets_are_all_there():
    assert {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160} <= {
        *FIRST_TOKEN_SECONDS
    }
    assert {0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80} <= {
        *TOKEN_SECONDS
    }
    assert {0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920} <= {
        *REQUEST_SECONDS
    }


def test_the_figures_agree_with_the_answers(serve, shelf):
    server = serve(lora_dir=shelf)
    answers = [complete(server, model=name, prompt=f"{i}" * 70) for i, name in enumerate(("tiny", "a0", "a0", "a1"))]
    answers.append(complete(server, prompt="0" * 70, n=2, max_tokens=3))
    document = read(server)
    usage = [answer["usage"] for answer in answers]
    generated = sum(u["completion_tokens"] for u in usage)
    assert generated == 4 * 6 + 2 * 3
    assert document["vllm:generation_tokens_total"] == document["vllm:request_generation_tokens_sum"] == generated
    # A prompt counts once for each of its texts.
    prompts = sum(u["prompt_tokens"] for u in usage) + usage[-1]["prompt_tokens"]
    assert document["vllm:prompt_tokens_total"] == document["vllm:request_prompt_tokens_sum"] == prompts
    assert document.value("vllm:request_success_total", finished_reason="length") == 6
    assert usage[-1]["prompt_tokens_details"]["cached_tokens"] == 64 == document["vllm:prefix_cache_hits_total"]
    assert document["vllm:prefix_cache_queries_total"] >= 64
    assert document["vllm:request_params_n_count"] == 5 and document["vllm:request_params_n_sum"] == 6
    assert document["vllm:request_params_max_tokens_sum"] == 4 * 6 + 3
    for name in ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time"):
        assert document[f"vllm:{name}_seconds_count"] == 6, name
    assert document["vllm:time_to_first_token_seconds_count"] == 6
    assert document["vllm:inter_token_latency_seconds_count"] == generated - 6
    assert document.value("minilora:adapter_requests_total", adapter="a0") == 2
    assert document.value("minilora:adapter_generation_tokens_total", adapter="a1") == 6
    assert document.value("minilora:http_responses_total", route="/v1/completions", status="200") == 5
    assert document["minilora:adapters_resident"] == 2 and document["minilora:engine_up"] == 1
    steps = [s.value for s in document.samples if s.name == "minilora:step_seconds_count"]
    assert sum(steps) == document["minilora:steps_total"] == document["vllm:iteration_tokens_total_count"]


# ---------------------------------------------------------------- Gateway API Inference Extension


@contextlib.contextmanager
def streaming(server, **fields):
    """A request under way; leaving ends it."""
    body = {"model": "tiny", "prompt": "Once", "max_tokens": 450, "ignore_eos": True, "stream": True, **fields}
    with server.client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        yield answer


def wait_for(server, condition, seconds=30):
    """A document for which the condition holds."""
    end = time.monotonic() + seconds
    while not condition(document := read(server)):
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.01)
    return document


def is_idle(document):
    return document["vllm:num_requests_running"] == document["vllm:num_requests_waiting"] == 0


def test_a_gateway_can_route_by_it(serve, shelf):
    """What the Gateway API Inference Extension asks of a model server: queue, KV cache, and adapters at work."""
    server = serve(engine={"max_num_seqs": 2, "debug_checks": False}, lora_dir=shelf, max_num_queued_reqs=20)
    before = time.time()
    stop = threading.Event()

    def client(name):
        while not stop.is_set():
            complete(server, model=name, max_tokens=200)

    clients = [threading.Thread(target=client, args=(name,)) for name in ("a0", "a1", "a2", "tiny") * 2]
    for thread in clients:
        thread.start()
    try:
        document = wait_for(
            server, lambda d: d["vllm:num_requests_running"] == 2 and d["vllm:num_requests_waiting"] >= 3
        )
        assert 0 < document["vllm:kv_cache_usage_perc"] <= 1
        [info] = document.families["vllm:cache_config_info"].samples
        assert int(info.labels["block_size"]) == 32 and int(info.labels["num_gpu_blocks"]) > 0
        [lora] = document.families["vllm:lora_requests_info"].samples
        running, waiting = (
            [name for name in lora.labels[f"{kind}_lora_adapters"].split(",") if name]
            for kind in ("running", "waiting")
        )
        assert lora.labels["max_lora"] == "16" and before <= lora.value <= time.time()
        assert set(running) | set(waiting) <= {"a0", "a1", "a2"} and len(running) <= 2 and waiting
        assert len(set(waiting)) == len(waiting)
        reasons = [s.value for s in document.families["vllm:num_requests_waiting_by_reason"].samples]
        assert sum(reasons) == document["vllm:num_requests_waiting"]
    finally:
        stop.set()
        for thread in clients:
            thread.join(60)
    document = wait_for(server, is_idle)
    [lora] = document.families["vllm:lora_requests_info"].samples
    assert lora.labels["running_lora_adapters"] == lora.labels["waiting_lora_adapters"] == ""
    assert document["vllm:kv_cache_usage_perc"] == 0


# ---------------------------------------------------------------- after an abort


def test_after_an_abort_the_gauges_return(serve, shelf):
    # So long that no text ends by itself before it is known that its client has left: 450 tokens take 20 ms.
    server = serve(lora_dir=shelf, engine={"max_model_len": 1 << 16})
    for i, name in enumerate(("tiny", "a0", "a0"), start=1):
        with streaming(server, model=name, max_tokens=60_000) as answer:
            next(answer.iter_lines())
        document = wait_for(server, is_idle)
        assert document.value("vllm:request_success_total", finished_reason="abort") == i
        assert document["vllm:kv_cache_usage_perc"] == 0 and document["minilora:adapters_in_use"] == 0
        assert document["vllm:e2e_request_latency_seconds_count"] == i
    assert document.value("vllm:request_success_total", finished_reason="length") == 0
    complete(server)
    assert read(server).value("vllm:request_success_total", finished_reason="length") == 1


# ---------------------------------------------------------------- S20: labels


@pytest.fixture(scope="module")
def app(model):
    engine = AsyncEngine(model, **SIZES)
    yield create_app(engine, ServerConfig(served_model_name=("tiny",), api_keys=("k",)))
    engine.close()


KEY = (b"authorization", b"Bearer k")


def document_of(app):
    return Document(ask(app, path="/metrics", headers=(HOST, KEY)).body.decode())


def test_s20_clients_can_not_make_metrics_grow(app):
    """10,000 models, methods, paths, hosts, keys and ids that nobody knows."""

    async def attack(start, count):
        for i in range(start, start + count):
            body = b'{"model": "m%d", "prompt": "x", "user": "u%d"}' % (i, i)
            more = (KEY, (b"x-request-id", b"id%d" % i))
            kinds = (
                ("POST", "/v1/completions", json_headers(body, *more), body),
                (f"METHOD{i}", "/version", (HOST, *more), None),
                ("GET", f"/path{i}", (HOST, *more), None),
                ("GET", f"/v1/models/m{i}", (HOST, *more), None),
                ("GET", f"/page/{i}.js", ((b"host", b"h%d" % i), *more), None),
                ("GET", "/version", (HOST, (b"authorization", b"Bearer %d" % i)), None),
            )
            answer = await ask_async(app, *kinds[i % len(kinds)])
            assert 400 <= answer.status < 500

    asyncio.run(attack(0, 60))
    assert ask(app, path="/metrics", headers=(HOST, KEY)).status == 200
    before = document_of(app)
    asyncio.run(attack(60, 10_000))
    after = document_of(app)
    assert after.series == before.series
    unknown = [s.labels["route"] for s in after.samples if s.name == "minilora:http_responses_total"]
    assert "other" in unknown and not any(any(c.isdigit() for c in route.replace("/v1", "")) for route in unknown)


def test_s20_adapters_that_are_gone_leave_no_labels(serve, shelf):
    server = serve(lora_dir=shelf, enable_runtime_lora=True, admin_keys=("chief",))
    chief = {"Authorization": "Bearer chief"}
    complete(server)
    before = read(server)
    for i in range(20):
        load = {"lora_name": f"new{i}", "lora_path": "a1"}
        assert server.client.post("/v1/load_lora_adapter", json=load, headers=chief).status_code == 200
        complete(server, model=f"new{i}")
        assert read(server).value("minilora:adapter_requests_total", adapter=f"new{i}") == 1
        unload = {"lora_name": f"new{i}"}
        assert server.client.post("/v1/unload_lora_adapter", json=unload, headers=chief).status_code == 200
    after = read(server)
    names = {dict(labels).get("adapter") for _, labels in after.series}
    assert names == {None, ""} and {n for n, _ in after.series} == {n for n, _ in before.series}


# ---------------------------------------------------------------- a dead engine


def test_a_dead_engine_still_tells_what_it_did(model):
    engine = AsyncEngine(model, **SIZES)
    app = create_app(engine, ServerConfig(served_model_name=("tiny",)))
    body = b'{"model": "tiny", "prompt": "x", "max_tokens": 4, "ignore_eos": true}'
    assert ask(app, "POST", "/v1/completions", json_headers(body), body).status == 200
    alive = Document(ask(app, path="/metrics").body.decode())
    engine.close()
    dead = Document(ask(app, path="/metrics").body.decode())
    assert (alive["minilora:engine_up"], dead["minilora:engine_up"]) == (1, 0)
    assert dead["vllm:generation_tokens_total"] == alive["vllm:generation_tokens_total"] == 4
    state = app.state.server
    fresh = asyncio.run(Metrics(engine, state.gate, "tiny").render()).decode()
    assert Document(fresh)["minilora:engine_up"] == 0


def test_an_engine_in_a_step_without_end_still_tells_what_it_did(model, monkeypatch):
    monkeypatch.setattr(metrics, "LONGEST_WAIT", 0.1)
    engine, go_on, ended = AsyncEngine(model, **SIZES), threading.Event(), []
    app = create_app(engine, ServerConfig(served_model_name=("tiny",)))
    before = Document(ask(app, path="/metrics").body.decode())
    engine._post(lambda: ended.append(go_on.wait(5)))
    try:
        stuck = Document(ask(app, path="/metrics").body.decode())
        assert not ended
    finally:
        go_on.set()
        engine.close()
    assert stuck.series >= before.series and stuck["minilora:engine_up"] == 1
