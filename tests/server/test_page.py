"""The page's files and headers, and /stats: that it says what /metrics says."""

import gzip
import json
import re
import threading
import time
from html.parser import HTMLParser
from importlib.resources import files
from math import inf

import pytest
from prometheus_client.parser import text_string_to_metric_families

from minilora.server import dashboard
from minilora.server.dashboard import MOST_WATCHERS, Rates, adapter_rows, quantile
from minilora.server.page import FILES
from minilora.stats import Histogram

FOLDER = files("minilora.server") / "page"
TEXTS = {place.name: place.read_text() for place in FOLDER.iterdir()}
MESSAGES = [{"role": "user", "content": "Hello, who is there? " * 4}]


def complete(running, model="tiny", tokens=5, **more):
    body = {"model": model, "messages": MESSAGES, "max_completion_tokens": tokens, "ignore_eos": True, **more}
    answer = running.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


# ------------------------------------------------------------ files


def test_every_file_is_served_with_its_headers(server):
    assert set(FILES) == set(TEXTS) and len(FILES) > 8
    for name, text in TEXTS.items():
        path = "/" if name == "index.html" else f"/page/{name}"
        answer = server.client.get(path)
        assert (answer.status_code, answer.text) == (200, text)
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'self'" and policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert not any("unsafe" in value or "*" in value or ":" in value for value in policy.values())
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-type"].split(";")[0] in (
            "text/html",
            "text/css",
            "text/javascript",
            "image/svg+xml",
        )


def test_etag(server):
    first = server.client.get("/page/app.js")
    tag = first.headers["etag"]
    for known in (tag, f'"other", {tag}', "*"):
        again = server.client.get("/page/app.js", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert server.client.get("/page/app.js", headers={"If-None-Match": '"other"'}).status_code == 200
    assert server.client.get("/page/api.js").headers["etag"] != tag
    assert first.headers["cache-control"] == "no-cache"


def test_compressed_where_the_client_takes_it(server):
    plain = server.client.get("/", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers and plain.headers["vary"] == "Accept-Encoding"
    with server.client.stream("GET", "/", headers={"Accept-Encoding": "gzip"}) as small:
        assert small.headers["content-encoding"] == "gzip"
        assert gzip.decompress(b"".join(small.iter_raw())) == plain.content


def test_head_and_unknown_files(server):
    head = server.client.head("/")
    assert head.status_code == 200 and not head.content and int(head.headers["content-length"]) > 1000
    for path in ("/page/", "/page/nothing.js", "/page/../page.py", "/page/%2e%2e/page.py", "/page/..%2fpage.py"):
        assert server.client.get(path).status_code in (404, 401), path
    assert server.client.post("/page/app.js", json={}).status_code == 405


def test_no_page_where_it_is_off(serve):
    running = serve(enable_page=False)
    assert [running.client.get(path).status_code for path in ("/", "/page/app.js", "/stats")] == [404] * 3


def test_the_page_is_small():
    assert sum(len(text.encode()) for text in TEXTS.values()) < 60_000


def test_nothing_comes_from_elsewhere():
    """No address but the name of the SVG namespace."""
    for name, text in TEXTS.items():
        assert set(re.findall(r"\w+://[^\s\"'`)]+", text)) <= {"http://www.w3.org/2000/svg"}, name
        assert not re.search(r"""["'(]//|@import|url\(""", text), name


def test_no_script_parses_html_or_code():
    sinks = "innerHTML outerHTML insertAdjacentHTML DOMParser createContextualFragment setHTML eval( Function( srcdoc"
    for name, text in TEXTS.items():
        if name.endswith(".js"):
            assert not [sink for sink in [*sinks.split(), "document.write", "setTimeout(`"] if sink in text], name


class Inline(HTMLParser):
    """Collects what the policy would block."""

    def __init__(self):
        super().__init__()
        self.found, self.labelled, self.fields = [], set(), []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.found += [name for name in attributes if name == "style" or name.startswith("on")]
        self.found += [tag] if tag == "style" or (tag == "script" and "src" not in attributes) else []


def test_no_inline_script_or_style():
    parser = Inline()
    parser.feed(TEXTS["index.html"])
    assert parser.found == []


def colours(css):
    """The variables of a rule's text that are colours."""
    return dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", css))


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme):
    """WCAG AA: 4.5 for text, 3 for borders of fields and for marks."""
    light, dark = TEXTS["style.css"].split("@media (prefers-color-scheme: dark)")
    found = colours(light) if scheme == "light" else colours(dark)
    text = [
        ("ink", "paper"),
        ("ink", "card"),
        ("ink", "tint"),
        ("soft", "paper"),
        ("soft", "card"),
        ("on-accent", "accent"),
    ]
    text += [("accent", "paper"), ("accent", "card"), ("accent", "tint"), ("warn", "warn-tint"), ("bad", "bad-tint")]
    marks = [
        ("edge", "card"),
        ("good", "card"),
        ("bad", "card"),
        ("hue-2", "card"),
        *((f"hue-{i}", "card") for i in (1, 3, 4)),
    ]
    for least, pairs in ((4.5, text), (3.0, marks)):
        for one, other in pairs:
            low, high = sorted((luminance(found[one]), luminance(found[other])))
            assert (high + 0.05) / (low + 0.05) >= least, (one, other)


# ------------------------------------------------------------ /stats


def metrics(running):
    """{(name, labels): value} of /metrics."""
    families = text_string_to_metric_families(running.client.get("/metrics").text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(found, name, **labels):
    """The one sample of a name that has these labels."""
    [only] = [v for (n, have), v in found.items() if n == name and labels.items() <= set(have)]
    return only


def buckets(found, name):
    """[(upper bound, count up to it)] of a histogram."""
    pairs = [(float(dict(labels)["le"]), v) for (n, labels), v in found.items() if n == f"{name}_bucket"]
    return sorted(pairs)


def histogram_quantile(share, pairs):
    """PromQL's function of that name."""
    rank, lower, below = share * pairs[-1][1], 0.0, 0.0
    for upper, count in pairs:
        if count >= rank and count > below:
            return lower if upper == inf else lower + (upper - lower) * (rank - below) / (count - below)
        lower, below = upper, count
    raise AssertionError("an empty histogram")


def test_stats_equal_metrics(server):
    for i in range(12):
        complete(server, model=("tiny", "a0", "a1")[i % 3], tokens=3 + i)
    stats, found = server.client.get("/stats").json(), metrics(server)
    assert stats["running"] == value(found, "vllm:num_requests_running") == 0
    assert stats["waiting"] == value(found, "vllm:num_requests_waiting") == 0
    assert stats["kv_cache_usage"] == value(found, "vllm:kv_cache_usage_perc")
    assert stats["preemptions"] == value(found, "vllm:num_preemptions_total")
    assert stats["prompt_tokens"] == value(found, "vllm:prompt_tokens_total") > 0
    assert stats["generation_tokens"] == value(found, "vllm:generation_tokens_total") >= sum(range(3, 15))
    hits, queries = (value(found, f"vllm:prefix_cache_{what}_total") for what in ("hits", "queries"))
    assert stats["prefix_cache_hit_rate"] == pytest.approx(hits / queries) and queries > 0
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency"):
        pairs = buckets(found, f"vllm:{name}_seconds")
        expected = {f"p{p}": pytest.approx(histogram_quantile(p / 100, pairs)) for p in (50, 95, 99)}
        assert stats["latency"][name] == expected
    rows = {row["name"]: row for row in stats["adapters"]}
    for name in ("a0", "a1"):
        assert rows[name]["requests"] == value(found, "minilora:adapter_requests_total", adapter=name) > 0
        assert rows[name]["bytes"] > 0 and rows[name]["state"] == "resident" and rows[name]["rank"] in (4, 5)


def test_stats_while_texts_run(server):
    """Events once a second, in which a running request is seen."""
    seen, begun = [], threading.Event()

    def watch():
        with server.client.stream("GET", "/stats", headers={"Accept": "text/event-stream"}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines():
                if line:
                    seen.append(json.loads(line.removeprefix("data: ")))
                    begun.set()
                if len(seen) == 3:
                    return

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert begun.wait(10)
    complete(server, model="a2", tokens=40)
    watcher.join(20)
    assert [event["state"] for event in seen] == ["ready"] * 3 and seen[0]["uptime"] < seen[2]["uptime"]
    assert seen[2]["generation_tokens"] - seen[0]["generation_tokens"] == 40
    assert seen[2]["tokens_per_s"]["generation"] > 0
    assert next(row for row in seen[2]["adapters"] if row["name"] == "a2")["last_used"] is not None


def test_no_more_watchers_than_there_is_room_for(server):
    watched = server.app.state.server.dashboard

    def follow():
        answer = server.client.send(server.client.build_request("GET", "/stats", headers=accept), stream=True)
        lines = answer.iter_lines()
        if answer.status_code == 200:
            next(lines)
        return answer, lines

    accept = {"Accept": "text/event-stream"}
    open_ones = [follow() for _ in range(MOST_WATCHERS)]
    refused, lines = follow()
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
    assert json.loads("".join(lines))["error"]["code"] == "too_many_dashboards"
    assert server.client.get("/stats").status_code == 200
    for answer, _ in open_ones:
        answer.close()
    deadline = time.monotonic() + 10
    while watched.watchers and time.monotonic() < deadline:
        time.sleep(0.02)
    assert watched.watchers == 0
    again, _ = follow()
    assert again.status_code == 200
    again.close()


def test_stats_want_the_key_and_the_page_does_not(serve):
    running = serve(api_keys=("secret-1",))
    bare = {"Authorization": ""}
    assert [running.client.get(path, headers=bare).status_code for path in ("/", "/page/app.js")] == [200, 200]
    assert running.client.get("/stats", headers=bare).status_code == 401
    assert running.client.get("/stats").json()["state"] == "ready"


def test_watchers_leave_a_server_that_has_drained(serve):
    running = serve()
    with running.client.stream("GET", "/stats", headers={"Accept": "text/event-stream"}) as answer:
        lines = answer.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["state"] == "ready"
        running.app.state.server.gate.drain()
        assert json.loads([line for line in lines if line][-1].removeprefix("data: "))["state"] == "draining"


def test_an_engine_that_was_closed_is_told(serve):
    running = serve()
    with running.client.stream("GET", "/stats", headers={"Accept": "text/event-stream"}) as answer:
        lines = answer.iter_lines()
        next(lines)
        running.engine.close()
        assert json.loads([line for line in lines if line][-1].removeprefix("data: "))["error"]["code"] == "draining"
    answer = running.client.get("/stats")
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "draining"


# ------------------------------------------------------------ figures


def test_quantile():
    histogram = Histogram((1.0, 2.0, 4.0))
    assert quantile(histogram, 0.5) is None
    for x in (0.5, 1.5, 1.5, 3.0):
        histogram.add(x)
    assert quantile(histogram, 0.25) == 1.0 and quantile(histogram, 0.5) == 1.5 and quantile(histogram, 1.0) == 4.0
    for _ in range(100):
        histogram.add(9.0)
    assert quantile(histogram, 0.99) == 4.0


def test_rates(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(dashboard.time, "monotonic", lambda: now[0])
    rates = Rates()
    for second, counters, expected in (
        (10, (100, 20), (10.0, 2.0)),
        (11, (100, 20), (0.0, 0.0)),
        (12, (160, 24), (30.0, 2.0)),
        (15, (160, 24), (12.0, 0.8)),
        (60, (160, 24), (0.0, 0.0)),
    ):
        now[0] = 100.0 + second
        assert rates.add(counters) == pytest.approx(expected), second


def test_the_busiest_adapters_come_first(server):
    complete(server, model="a3")
    complete(server, model="a1")
    names = [row["name"] for row in adapter_rows(server.stats())]
    assert names[:2] == ["a1", "a3"]
