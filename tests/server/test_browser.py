"""The page in a real browser: what it shows, what it sends, and that nothing of a text or a name ever runs."""

import json
import re
import time
from itertools import pairwise

import pytest

pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
from playwright.sync_api import expect, sync_playwright

from .test_page import buckets, histogram_quantile, metrics, value

pytestmark = pytest.mark.browser

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
# A refused or failed request is named in the console by the browser itself.
REFUSED = "Failed to load resource"
WAIT = 15_000


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield browser
        browser.close()


class Visit:
    """A page on a server. console: what was said there; requests: all that were sent."""

    def __init__(self, browser, running, **options):
        self.running = running
        self.context = browser.new_context(base_url=running.url, accept_downloads=True, **options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(WAIT)
        self.console, self.requests = [], []
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("pageerror", lambda error: self.console.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request))

    def open(self, view="chat"):
        self.page.goto(f"/#{view}")
        self.wait_for("ready")
        return self.page

    def wait_for(self, state):
        expect(self.page.locator("#status")).to_have_attribute("data-state", state, timeout=WAIT)

    def alter(self, **fields):
        """Send chat requests with these fields beside the page's own."""

        def change(route):
            body = {**route.request.post_data_json, **fields}
            route.continue_(post_data=json.dumps(body))

        self.page.route("**/v1/chat/completions", change)

    def bodies(self):
        """Of all chat requests that the page made."""
        return [r.post_data_json for r in self.requests if r.url.endswith("/v1/chat/completions")]

    def ask(self, text, wait=True):
        self.page.fill("#chat-text", text)
        self.page.press("#chat-text", "Enter")
        if wait:
            self.finished()

    def finished(self):
        expect(self.page.locator("#chat-send")).to_be_visible(timeout=WAIT)


@pytest.fixture
def visit(chromium):
    """A function: a server and options of a browser context -> a Visit; at the end nothing may have gone wrong."""
    made = []

    def start(running, errors=(), **options):
        made.append((Visit(chromium, running, **options), errors))
        return made[-1][0]

    yield start
    for found, errors in made:
        found.context.close()
        assert [text for text in found.console if not text.startswith(tuple(errors))] == []
        outside = [r.url for r in found.requests if not r.url.startswith((found.running.url + "/", "blob:"))]
        assert outside == []


@pytest.fixture(scope="module")
def slow(serve, shelf):
    """A server whose steps take 20 ms at least, with one key that may have one request under way."""
    running = serve(lora_dir=shelf, api_keys=("key-1",), max_queued_per_key=1)
    step = running.engine._llm.step

    def dawdle():
        time.sleep(0.02)
        return step()

    running.engine._llm.step = dawdle
    return running


def gauge(running, name):
    return value(metrics(running), name)


def wait_until(check, seconds=10):
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, "it does not come to pass"
        time.sleep(0.05)


def give_key(page, key="key-1"):
    page.fill("#key", key)
    page.press("#key", "Enter")


# ------------------------------------------------------------ chat


def test_chat_streams_and_keeps_its_figures(server, visit):
    chat = visit(server)
    page = chat.open()
    chat.alter(ignore_eos=True, max_completion_tokens=24)
    chat.ask("Hello")
    answer = page.locator(".from-model")
    expect(answer.locator(".who")).to_have_text("tiny")
    assert answer.locator(".text").inner_text()
    figures = r"24 tokens · [\d.,]+ tokens/s · first token [\d.]+ (ms|s) · stopped at the token limit"
    expect(answer.locator(".meta")).to_have_text(re.compile(figures))
    chat.ask("And again")
    sent = chat.bodies()[1]["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "user"]
    assert page.locator(".meta").count() == 2
    page.reload()
    expect(page.locator(".from-model")).to_have_count(2)
    expect(page.locator(".meta").first).to_have_text(re.compile(figures))
    page.click("#new-chat")
    expect(page.locator("#messages li")).to_have_count(0)


def test_the_adapter_is_the_model_of_the_request(server, visit):
    chat = visit(server)
    page = chat.open()
    chat.alter(max_completion_tokens=4)
    names = page.locator("#chat-model option").all_inner_texts()
    assert names == ["tiny (base)", "a0", "a1", "a2", "a3"]
    chat.ask("Hello")
    page.select_option("#chat-model", "a2")
    chat.ask("Hello")
    page.locator("#settings [name=scale]").fill("0.5")
    chat.ask("Hello")
    found = [(body["model"], body.get("lora")) for body in chat.bodies()]
    assert found == [("tiny", None), ("a2", None), ("tiny", [{"name": "a2", "scale": 0.5}])]
    expect(page.locator(".who")).to_have_text(["tiny", "a2", "a2"])


def test_sampling_and_system_prompt_are_sent(server, visit):
    chat = visit(server)
    page = chat.open()
    fields = {"temperature": "0", "top_p": "0.9", "top_k": "20", "seed": "7", "max_completion_tokens": "3"}
    for name, text in {**fields, "system": "Be brief.", "stop": "END\nSTOP"}.items():
        page.locator(f"#settings [name={name}]").fill(text)
    chat.ask("Hello")
    [body] = chat.bodies()
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {name: body[name] for name in fields} == {name: float(text) for name, text in fields.items()}
    assert body["stop"] == ["END", "STOP"] and body["stream"] and "min_p" not in body
    page.locator("#settings [name=temperature]").fill("99")
    chat.ask("Hello", wait=False)
    assert len(chat.bodies()) == 1, "a field with a wrong value holds the request back"


def test_regenerate_edit_copy_and_export(server, visit):
    chat = visit(server, permissions=["clipboard-read", "clipboard-write"])
    page = chat.open()
    chat.alter(max_completion_tokens=5, ignore_eos=True)
    chat.ask("First")
    chat.ask("Second")
    page.locator(".from-model").first.get_by_role("button", name="Regenerate").click()
    chat.finished()
    expect(page.locator("#messages li")).to_have_count(2)
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit the message").fill("Changed")
    page.keyboard.press("Enter")
    chat.finished()
    expect(page.locator(".bubble")).to_have_text(["Changed"])
    assert chat.bodies()[-1]["messages"] == [{"role": "user", "content": "Changed"}]
    page.locator(".from-user").get_by_role("button", name="Copy").click()
    assert page.evaluate("navigator.clipboard.readText()") == "Changed"
    with page.expect_download() as download:
        page.click("#export-json")
    kept = json.loads(download.value.path().read_text())
    assert [message["role"] for message in kept["messages"]] == ["user", "assistant"]
    assert kept["messages"][1]["stats"]["tokens"] == 5 and kept["base"] == "tiny"
    with page.expect_download() as download:
        page.click("#export-markdown")
    assert "**You**\n\nChanged\n\n**tiny** (5 tokens" in download.value.path().read_text()


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop_frees_the_request(slow, visit, way):
    chat = visit(slow, [REFUSED])
    chat.page.goto("/")
    give_key(chat.page)
    chat.wait_for("ready")
    chat.alter(ignore_eos=True, max_completion_tokens=400)
    chat.ask("Hello", wait=False)
    wait_until(lambda: gauge(slow, "vllm:num_requests_running") == 1)
    expect(chat.page.locator(".from-model .text")).not_to_be_empty()
    if way == "button":
        chat.page.click("#chat-stop")
    else:
        chat.page.keyboard.press("Escape")
    chat.finished()
    wait_until(lambda: gauge(slow, "vllm:num_requests_running") == 0)
    expect(chat.page.locator(".meta")).to_have_text(re.compile(r"^\d+ tokens? .* stopped$"))


# ------------------------------------------------------------ compare


def test_compare_shows_different_answers(server, visit):
    compare = visit(server)
    page = compare.open("compare")
    compare.alter(ignore_eos=True, max_completion_tokens=12, temperature=0)
    page.click("#add-column")
    page.click("#add-column")
    expect(page.locator("#add-column")).to_be_disabled()
    page.fill("#compare-text", "Who are you?")
    page.press("#compare-text", "Enter")
    expect(page.locator(".column .meta")).to_have_text([re.compile("^12 tokens")] * 4)
    expect(page.locator("#compare-total")).to_have_text(re.compile("48 tokens together"))
    assert len(set(page.locator(".column .text").all_inner_texts())) == 4
    assert sorted(body["model"] for body in compare.bodies()) == ["a0", "a1", "a2", "tiny"]
    for _ in range(2):
        page.get_by_role("button", name="Remove this column").first.click()
    expect(page.locator(".column")).to_have_count(2)
    expect(page.get_by_role("button", name="Remove this column").first).to_be_disabled()


# ------------------------------------------------------------ dashboard


def seconds(text):
    """ "40 ms" as a number."""
    number, unit = text.split()
    return float(number) / (1000 if unit == "ms" else 1)


def test_dashboard_equals_metrics(server, visit):
    for model in ("tiny", "a1", "a1"):
        body = {"model": model, "messages": [{"role": "user", "content": "Hello " * 20}], "max_completion_tokens": 9}
        server.client.post("/v1/chat/completions", json=body).raise_for_status()
    page = visit(server).open("dashboard")
    row = page.locator("[data-row=a1] td")
    found = metrics(server)
    expect(page.locator("#tile-running")).to_have_text(f"{value(found, 'vllm:num_requests_running'):.0f}")
    expect(page.locator("#tile-waiting")).to_have_text(f"{value(found, 'vllm:num_requests_waiting'):.0f}")
    expect(page.locator("#tile-kv")).to_have_text(f"{100 * value(found, 'vllm:kv_cache_usage_perc'):.0f}%")
    hits, queries = (value(found, f"vllm:prefix_cache_{what}_total") for what in ("hits", "queries"))
    shown = page.locator("#tile-prefix").inner_text()
    assert float(shown.rstrip("%")) == pytest.approx(100 * hits / queries, abs=0.51)
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency"):
        pairs = buckets(found, f"vllm:{name}_seconds")
        cells = page.locator(f"[data-row={name}] td").all_inner_texts()
        for cell, share in zip(cells, (0.5, 0.95, 0.99), strict=True):
            expected = histogram_quantile(share, pairs)
            assert seconds(cell) == pytest.approx(expected, rel=0.06, abs=6e-5), (name, share)
    expect(row.nth(0)).to_have_text("resident")
    expect(row.nth(5)).to_have_text(f"{value(found, 'minilora:adapter_requests_total', adapter='a1'):.0f}")


def test_dashboard_is_live_and_rests_when_nobody_looks(slow, visit):
    board = visit(slow, [REFUSED])
    board.page.goto("/#dashboard")
    give_key(board.page)
    watchers = slow.app.state.server.dashboard
    expect(board.page.locator("#tile-running")).to_have_text("0")
    with slow.client.stream("POST", "/v1/completions", json=long_request()):
        expect(board.page.locator("#tile-running")).to_have_text("1", timeout=WAIT)
        expect(board.page.locator("#tile-generation")).not_to_have_text("0", timeout=WAIT)
    expect(board.page.locator("#tile-running")).to_have_text("0", timeout=WAIT)
    assert watchers.watchers == 1
    board.page.goto("/#chat")
    wait_until(lambda: watchers.watchers == 0)
    board.page.goto("/#dashboard")
    wait_until(lambda: watchers.watchers == 1)
    board.page.evaluate(
        "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    wait_until(lambda: watchers.watchers == 0)


def long_request():
    return {"model": "tiny", "prompt": "Hello", "max_tokens": 400, "ignore_eos": True, "stream": True}


# ------------------------------------------------------------ states


def test_key_prompt(slow, visit):
    chat = visit(slow, [REFUSED])
    chat.page.goto("/")
    dialog = chat.page.locator("#key-dialog")
    expect(dialog).to_be_visible()
    expect(chat.page.locator("#key")).to_be_focused()
    give_key(chat.page, "wrong")
    expect(chat.page.locator("#key-wrong")).to_be_visible()
    chat.page.keyboard.press("Escape")
    expect(dialog).not_to_be_visible()
    chat.wait_for("key")
    chat.page.get_by_role("button", name="Enter key").click()
    expect(dialog).to_be_visible()
    give_key(chat.page)
    chat.wait_for("ready")
    kept = chat.page.evaluate("[sessionStorage.getItem('minilora-key'), localStorage.length, document.cookie]")
    assert kept == ["key-1", 0, ""]
    chat.page.reload()
    chat.wait_for("ready")
    expect(dialog).not_to_be_visible()
    chat.page.get_by_role("button", name="Forget key").click()
    expect(dialog).to_be_visible()
    assert chat.page.evaluate("sessionStorage.getItem('minilora-key')") is None


@pytest.mark.parametrize("way", ["wait", "button"])
def test_a_full_server_is_asked_again(slow, visit, way):
    chat = visit(slow, [REFUSED])
    chat.page.goto("/")
    give_key(chat.page)
    chat.wait_for("ready")
    chat.alter(max_completion_tokens=3, ignore_eos=True)
    notice = chat.page.locator(".answer .notice")
    with slow.client.stream("POST", "/v1/completions", json=long_request()):
        chat.ask("Hello", wait=False)
        expect(notice).to_have_text(re.compile(r"Trying again in \d+ s"))
        expect(chat.page.locator("#chat-stop")).to_be_visible()
    wait_until(lambda: gauge(slow, "vllm:num_requests_running") == 0)
    if way == "button":
        notice.get_by_role("button", name="Try now").click()
    chat.finished()
    expect(notice).not_to_be_visible()
    expect(chat.page.locator(".meta")).to_have_text(re.compile("^3 tokens"))


def test_a_server_that_goes_and_comes_back(server, visit):
    chat = visit(server, [REFUSED])
    page = chat.open()
    chat.context.set_offline(True)
    chat.ask("Hello")
    expect(page.locator(".answer .notice")).to_have_text(re.compile("The server cannot be reached"))
    chat.wait_for("gone")
    chat.context.set_offline(False)
    chat.wait_for("ready")
    page.get_by_role("button", name="Try again").click()
    chat.finished()
    expect(page.locator(".answer .notice")).not_to_be_visible()


def test_draining_is_shown(serve, visit):
    running = serve()
    chat = visit(running, [REFUSED])
    chat.open()
    running.app.state.server.gate.drain()
    chat.ask("Hello", wait=False)
    chat.wait_for("draining")
    expect(chat.page.locator(".answer .notice")).to_have_text(re.compile("The server is shutting down"))


def test_an_error_in_words(server, visit):
    chat = visit(server, [REFUSED])
    page = chat.open()
    chat.alter(model="a9")
    chat.ask("Hello")
    expect(page.locator(".answer .notice")).to_have_text(re.compile("No model or adapter is called 'a9'"))


# ------------------------------------------------------------ safety

HIT = "window.hit=(window.hit||0)+1"
PAYLOADS = (
    f"<script>{HIT}</script>",
    f'<img src=x onerror="{HIT}">',
    f"<svg onload={HIT}></svg>",
    f'"><iframe srcdoc="<script>parent.{HIT}</script>"></iframe>',
    f'<a href="javascript:{HIT}">go</a>',
    f"[go](javascript:{HIT})",
    f"</textarea></title></option><script>{HIT}</script>",
    f"<math><mtext><table><mglyph><style><img src=x onerror={HIT}>",
    f'<style>@import "data:text/css,*{{x:y}}"</style><link rel=stylesheet href="data:,"><meta http-equiv=refresh content="0;url=javascript:{HIT}">',
    "${" + HIT + "}{{" + HIT + "}}`+" + HIT + "+`",
    f"```html\n<body onload={HIT}>\n```\n<details open ontoggle={HIT}>",
    f'<form action="javascript:{HIT}"><button autofocus onfocus="{HIT}">x</button></form>',
)


def answer_with(text):
    """A stream whose text is this."""
    chunks = [
        {"choices": [{"index": 0, "delta": {"content": text}}]},
        {"choices": [], "usage": {"completion_tokens": 1}},
    ]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def assert_inert(visit):
    page = visit.page
    foreign = "main :is(script, iframe, img, svg[onload], a:not([href^='#']), style, link, meta, math, details)"
    assert page.evaluate(f"document.querySelectorAll({json.dumps(foreign)}).length") == 0
    assert page.evaluate("window.hit") is None
    assert visit.console == [], "the policy had something to block"


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_s27_web_xss(server, visit, payload):
    """A payload as question, answer, model's name, system prompt, error message and adapter's name stays text."""
    chat = visit(server)
    page = chat.page
    listed = {"data": [{"id": "tiny"}, {"id": payload, "parent": "tiny"}]}
    page.route("**/v1/models", lambda route: route.fulfill(json=listed))
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=answer_with(payload)),
    )
    chat.open()
    page.select_option("#chat-model", payload)
    page.locator("#settings [name=system]").fill(payload)
    chat.ask(payload)
    code = payload.startswith("```")
    expect(page.locator(".bubble")).to_have_text(payload)
    expect(page.locator(".who")).to_have_text(payload)
    shown = page.locator(".from-model .text").text_content()
    assert shown == (payload.replace("```html\n", "").replace("```\n", "") if code else payload)
    assert_inert(chat)
    page.reload()
    expect(page.locator(".bubble")).to_have_text(payload)
    page.goto("/#compare")
    page.locator(".column select").first.select_option(payload)
    page.fill("#compare-text", payload)
    page.press("#compare-text", "Enter")
    expect(page.locator("#question")).to_have_text(payload)
    expect(page.locator(".column .meta")).to_have_text([re.compile("^1 token ·")] * 2)
    assert_inert(chat)
    stats = server.client.get("/stats").json()
    row = {**stats["adapters"][0], "name": payload, "state": payload} if stats["adapters"] else adapter_row(payload)
    event = f"data: {json.dumps({**stats, 'model': payload, 'version': payload, 'adapters': [row]})}\n\n"
    page.route("**/stats", lambda route: route.fulfill(content_type="text/event-stream", body=event))
    page.goto("/#dashboard")
    expect(page.locator("#adapters th")).to_have_text(payload)
    expect(page.locator("#facts")).to_contain_text(payload)
    assert_inert(chat)


def adapter_row(name):
    numbers = dict.fromkeys(("rank", "bytes", "running", "waiting", "requests"), 1)
    return {"name": name, "state": name, "last_used": None, **numbers}


def test_an_error_message_stays_text(server, visit):
    chat = visit(server, [REFUSED])
    page = chat.open()
    failure = {"error": {"message": PAYLOADS[1], "code": None}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=400, json=failure))
    chat.ask("Hello")
    expect(page.locator(".answer .notice span")).to_have_text(f"{PAYLOADS[1]}.")
    assert page.evaluate("window.hit") is None and page.locator("main img").count() == 0


# ------------------------------------------------------------ for everybody


def test_keyboard_only(server, visit):
    chat = visit(server)
    page = chat.open()
    chat.alter(max_completion_tokens=3, ignore_eos=True)
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    expect(page.locator(".skip")).to_be_in_viewport()
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        seen.append(page.evaluate(FOCUSED))
        if seen[-1]["id"] == "chat-text":
            break
    assert seen[-1]["id"] == "chat-text" and all(stop["visible"] for stop in seen), seen
    assert [stop["text"] for stop in seen[:3]] == ["Chat", "Compare", "Dashboard"]
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    page.keyboard.press("Enter")
    chat.finished()
    assert chat.bodies()[0]["messages"][-1]["content"] == "Hello\nthere"
    page.get_by_role("button", name="Regenerate").focus()
    page.keyboard.press("Enter")
    chat.finished()
    assert len(chat.bodies()) == 2
    page.get_by_role("link", name="Compare").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#compare-view")).to_be_visible()
    expect(page.get_by_role("link", name="Compare")).to_have_attribute("aria-current", "page")


# What has the focus, and whether anybody can see that it has.
FOCUSED = """() => {
  const it = document.activeElement;
  const rings = [it, it.closest("form")].filter(Boolean).map((e) => getComputedStyle(e));
  const visible = rings.some((s) => s.outlineStyle !== "none" && parseFloat(s.outlineWidth) >= 2);
  return { id: it.id, text: it.textContent.trim(), visible };
}"""


def test_everything_has_a_name(server, visit):
    page = visit(server).open()
    for view in ("chat", "compare", "dashboard"):
        page.goto(f"/#{view}")
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("button, a, input, select, textarea, meter, [role=region], table th")]
            .filter((e) => e.offsetParent && !(e.ariaLabel || e.textContent.trim() || e.labels?.length
                || document.getElementById(e.getAttribute("aria-labelledby"))))
            .map((e) => e.outerHTML)"""
        )
        assert nameless == []


def test_screen_readers_hear_the_answer(server, visit):
    chat = visit(server)
    page = chat.open()
    page.evaluate(
        "window.heard = []; new MutationObserver(() => heard.push([performance.now(), speech.textContent]))"
        ".observe(speech, { childList: true })"
    )
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=answer_with("One two three.")),
    )
    chat.ask("Hello")
    wait_until(lambda: "End of the answer" in "".join(text for _, text in page.evaluate("heard")))
    heard = page.evaluate("heard")
    assert "One two three." in "".join(text for _, text in heard)
    assert all(after - before > 1500 for (before, _), (after, _) in pairwise(heard))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens(server, visit, scheme):
    chat = visit(server, viewport={"width": 320, "height": 568}, color_scheme=scheme, has_touch=True, is_mobile=True)
    page = chat.open()
    chat.alter(max_completion_tokens=30, ignore_eos=True)
    chat.ask("unbreakable" * 30)
    for view in ("chat", "compare", "dashboard"):
        page.goto(f"/#{view}")
        expect(page.locator(f"#{view}-view")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 320, view
    page.goto("/#chat")
    for control in ("#chat-text", "#chat-model", "#chat-send"):
        expect(page.locator(control)).to_be_in_viewport(ratio=1)
    page.locator("#chat-view .settings-toggle").tap()
    expect(page.locator("#settings [name=temperature]")).to_be_in_viewport()
    page.locator("#settings-close").tap()
    expect(page.locator("#settings")).not_to_be_visible()
    expect(page.locator("#chat-view .settings-toggle")).to_be_focused()
