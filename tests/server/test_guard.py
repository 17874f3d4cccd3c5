"""The guard: who is let in, by which name, with which body. S19, S21, S22: see KNOWN_FAILURES.md."""

import asyncio
import hmac
import json
import logging
import re

import pytest

from minilora import AsyncEngine
from minilora.server import ServerConfig, body, create_app, guard
from minilora.server.body import MOST_DEPTH, BodyReader, check_json
from minilora.server.failures import ApiError
from minilora.server.guard import MOST_HEADER_BYTES, MOST_HEADERS, Hosts, is_loopback, protect

from .conftest import SIZES
from .raw import HOST, ask, bearer, echo, json_headers

KEYS = {"api_keys": ("user-1", "user-2"), "admin_keys": ("chief",)}
METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT", "get", "X-NEW")


@pytest.fixture(scope="module")
def engine(model):
    engine = AsyncEngine(model, **SIZES)
    yield engine
    engine.close()


@pytest.fixture(autouse=True)
def no_lingering(monkeypatch):
    monkeypatch.setattr(body, "LINGER_SECONDS", 0.05)


def guarded(app=echo, **options):
    return protect(app, ServerConfig(**options))


def post(app, body, *more, path="/v1/x"):
    return ask(app, "POST", path, json_headers(body, *more), body)


# ---------------------------------------------------------------- S21: keys


def filled(path):
    """A route's path with a value for its parameters."""
    return re.sub(r"{[^}]*}", "app.js", path)


def routes_of(app):
    """(path with its parameters filled in, methods) of every route that the application has."""
    found, routers = [], [app.router]
    while routers:
        for route in routers.pop().routes:
            # FastAPI keeps the routers that were included as they are.
            if (inner := getattr(route, "original_router", None)) is not None:
                routers.append(inner)
            else:
                found.append((filled(route.path), set(route.methods)))
    assert {filled(path) for path in app.openapi()["paths"]} <= {path for path, _ in found}
    return found


def test_s21_every_route_wants_a_key(engine, shelf):
    app = create_app(engine, ServerConfig(**KEYS, lora_dir=shelf, enable_runtime_lora=True))
    routes = routes_of(app)
    paths = {path for path, _ in routes}
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics", "/stats", "/tokenize"} <= paths
    assert {"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/health", "/ready", "/", "/page/app.js"} <= paths
    open_paths = {"/health", "/ready", "/", "/page/app.js"}
    wrong = ("user-", "user-11", "USER-1", "", "user-1 x", "chie", "ü", "\0", "x" * 5000)
    for path in paths | {"/nothing", "/v1", "/docs", "/redoc"}:
        for method in METHODS:
            expected = path in open_paths and method in ("GET", "HEAD")
            for headers in ((HOST,), *((HOST, bearer(key)) for key in wrong)):
                assert (ask(app, method, path, headers).status != 401) == expected, (method, path, headers)


def test_s21_the_right_keys_open(engine):
    app = create_app(engine, ServerConfig(**KEYS))
    for key in ("user-1", "user-2", "chief"):
        assert ask(app, "GET", "/version", (HOST, bearer(key))).status == 200
    for value in (b"bearer user-1", b"BEARER  user-1 "):
        assert ask(app, "GET", "/version", (HOST, (b"authorization", value))).status == 200
    for value in (b"Basic user-1", b"user-1", b"Beareruser-1", b"Bearer user-1, Bearer user-2"):
        assert ask(app, "GET", "/version", (HOST, (b"authorization", value))).status == 401
    assert ask(app, "GET", "/version", (HOST, bearer("user-1"), bearer("user-2"))).status == 401
    assert ask(app, "GET", "/version", (HOST, (b"x-api-key", b"user-1"))).status == 401
    assert ask(app, "GET", "/version?api_key=user-1", (HOST,)).status == 401


def test_s21_admin_routes_want_an_admin_key(engine, shelf):
    """Found in the table of routes: whatever loads or unloads."""
    app = create_app(engine, ServerConfig(**KEYS, lora_dir=shelf, enable_runtime_lora=True))
    admin = [path for path, _ in routes_of(app) if "load" in path]
    assert len(admin) == 2
    body = json.dumps({"lora_name": "nobody", "lora_path": "nothing"}).encode()
    for path in admin:
        assert post(app, body, bearer("user-1"), path=path).error["code"] == "admin_key_required"
        assert post(app, body, bearer("chief"), path=path).status in (400, 404)
        for disguise in ("\n", "\r", "\0", "/", "//", ";", " ", "/.", "?"):
            assert post(app, body, bearer("user-1"), path=path + disguise).status in (403, 404), disguise


def test_s21_a_route_for_admins_asks_for_one_itself(engine, shelf, monkeypatch):
    """Whatever the guard lets through."""
    monkeypatch.setattr(guard, "_CONTROL", re.compile("nothing like this"))
    app = create_app(engine, ServerConfig(**KEYS, lora_dir=shelf, enable_runtime_lora=True))
    body = json.dumps({"lora_name": "nobody", "lora_path": "nothing"}).encode()
    for path in ("/v1/load_lora_adapter\n", "/v1/unload_lora_adapter\n"):
        assert post(app, body, bearer("user-1"), path=path).error["code"] == "admin_key_required"
        assert post(app, body, bearer("chief"), path=path).status in (400, 404)


DISGUISES = (
    "//version",
    "/version/",
    "/health/../version",
    "/version/../health",
    "/v1/../health",
    "/page/../version",
    "/page/../v1/models",
    "/page/..",
    "/page//../version",
    "/page/x/../../version",
    "/page/.hidden",
    "/health/",
    "/health/version",
    "/health;/version",
    "/health\0",
    "/health\n",
    "/health ",
    "/healthy",
    "/Health",
    "/%2e%2e/version",
    "/page%2f..%2fversion",
    "/page/%2e%2e/version",
    "\\health",
    "health",
    "",
    "*",
    "http://localhost/health",
    "/@localhost/health",
)


def test_s21_no_redirect_takes_a_key_to_another_scheme(engine):
    app = create_app(engine, ServerConfig(**KEYS))
    for path in ("/version/", "/v1/load_lora_adapter/", "/metrics/"):
        assert ask(app, "GET", path, headers=(HOST, bearer("chief"))).status == 404


@pytest.mark.parametrize("path", DISGUISES)
def test_s21_disguised_paths_never_get_past_the_key(engine, path):
    app = create_app(engine, ServerConfig(**KEYS))
    for method in ("GET", "HEAD", "OPTIONS"):
        assert ask(app, method, path).status == 401, method
    assert ask(app, "GET", "/ready?x=/../version#").body == b""


@pytest.mark.parametrize("root", ["/health", "/v1", "/page", "/proxy", "/"])
def test_s21_a_root_path_opens_nothing(engine, root):
    """The guard strips the prefix just as the router does."""
    app = create_app(engine, ServerConfig(**KEYS))
    for path in ("/version", "/metrics", "/v1/models", "/health/version", "/stats", "/health/../version"):
        for prefix in ("", root, root * 2, root + "/..", root + "/health"):
            # Without a key, no more than that the page has no such file.
            expected = 404 if root == "/page" and re.fullmatch("/page/page/[a-z]+", prefix + path) else 401
            assert ask(app, "GET", prefix + path, root_path=root).status == expected, prefix + path
    for path in ("/ready", root.rstrip("/") + "/ready"):
        assert ask(app, "GET", path, root_path=root).status == 200


def test_s21_all_keys_are_compared_as_digests(monkeypatch):
    """Neither the place of a key nor how much of it is right can be told from the work done."""
    compared, original = [], hmac.compare_digest

    def compare(a, b):
        compared.append((len(a), len(b)))
        return original(a, b)

    monkeypatch.setattr(guard.hmac, "compare_digest", compare)
    app = guarded(**KEYS)
    for key in ("user-1", "user-2", "chief", "wrong", "user-", "x" * 4000):
        compared.clear()
        ask(app, headers=(HOST, bearer(key)))
        assert compared == [(32, 32)] * 3


def test_s21_keys_are_told_to_nobody(caplog):
    caplog.set_level(logging.DEBUG)
    app = guarded(**KEYS)
    told = [json.loads(ask(app, headers=(HOST, bearer(key))).body) for key in ("user-1", "user-2", "chief", "user-1")]
    assert [answer["admin"] for answer in told] == [False, False, True, False]
    assert told[0]["key"] == told[3]["key"] and len({answer["key"] for answer in told}) == 3
    again = json.loads(ask(guarded(**KEYS), headers=(HOST, bearer("user-1"))).body)
    assert again["key"] != told[0]["key"], "a digest can be tried out offline"
    refused = ask(app, headers=(HOST, bearer("my-secret")))
    assert refused.headers["www-authenticate"] == "Bearer"
    for text in (refused.body.decode(), caplog.text, str(told)):
        assert not any(key in text for key in ("user-1", "user-2", "chief", "my-secret"))
    assert repr(ServerConfig(**KEYS)).count("user-1") == 0


def test_an_open_server_asks_for_no_key():
    app = guarded()
    assert json.loads(ask(app).body) == {"path": "/version", "size": 0, "key": "", "admin": False}
    assert ask(app, headers=(HOST, bearer("EMPTY"))).status == 200
    half = guarded(admin_keys=("chief",))
    assert json.loads(ask(half, headers=(HOST, bearer("EMPTY"))).body)["admin"] is False
    assert json.loads(ask(half, headers=(HOST, bearer("chief"))).body)["admin"] is True


def test_s21_an_open_server_has_admins_all_the_same(engine, shelf):
    app = create_app(engine, ServerConfig(admin_keys=("chief",), lora_dir=shelf, enable_runtime_lora=True))
    body = json.dumps({"lora_name": "nobody", "lora_path": "nothing"}).encode()
    assert post(app, body, path="/v1/load_lora_adapter").error["code"] == "admin_key_required"
    assert post(app, body, bearer("chief"), path="/v1/load_lora_adapter").status in (400, 404)


def test_without_the_page_its_paths_are_closed():
    app = guarded(api_keys=("k",), enable_page=False)
    assert [ask(app, path=path).status for path in ("/", "/page/app.js", "/health")] == [401, 401, 200]


def test_websockets_are_refused_and_the_rest_passes():
    seen = []

    async def app(scope, receive, send):
        seen.append(scope["type"])

    async def send(message):
        seen.append(message)

    asyncio.run(guarded(app)({"type": "websocket", "headers": []}, None, send))
    asyncio.run(guarded(app)({"type": "lifespan"}, None, send))
    assert seen == [{"type": "websocket.close", "code": 1008}, "lifespan"]


# ---------------------------------------------------------------- S22: Host and origins


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:1", "[::1]", "[::1]:8000", "LOCALHOST"])
def test_s22_loopback_names_are_good(host):
    assert ask(guarded(), headers=((b"host", host.encode()),)).status == 200


FOREIGN = ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io", "127.0.0.2", "0.0.0.0")
MALFORMED = ("", "a b", "localhost@evil.example", "localhost/health", "localhost:x", "localhost:", "[::1", "a,b", "é")


@pytest.mark.parametrize("host", [*FOREIGN, *MALFORMED])
def test_s22_foreign_hosts_are_refused(host):
    for path in ("/version", "/metrics", "/"):
        answer = ask(guarded(), path=path, headers=((b"host", host.encode("latin-1")),))
        assert answer.status == 400 and answer.error["code"] == "invalid_host"


def test_s22_hosts_by_configuration():
    assert ask(guarded(), headers=()).status == 400
    assert ask(guarded(), headers=(HOST, (b"host", b"evil.example"))).status == 400
    named = guarded(allowed_hosts=("Models.Example",))
    assert ask(named, headers=((b"host", b"models.example:443"),)).status == 200
    assert ask(named, headers=((b"host", b"evil.example"),)).status == 400
    # A server for other machines takes any name, as long as it is one.
    public = guarded(host="0.0.0.0")
    assert ask(public, headers=((b"host", b"node7.example"),)).status == 200
    assert ask(public, headers=((b"host", b"a b"),)).status == 400
    assert ask(public, headers=(), version="1.0").status == 200 and ask(public, headers=()).status == 400
    behind = guarded(host="0.0.0.0", allowed_hosts=("models.example",))
    assert [ask(behind, headers=((b"host", h),)).status for h in (b"models.example", b"localhost", b"x")] == [
        200,
        200,
        400,
    ]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_probes_come_by_any_name(method):
    """Kubernetes asks a pod by its address; of a web page with a name of its own this tells no more than time does."""
    named = guarded(allowed_hosts=("models.example",))
    for path, status in (("/health", 200), ("/ready", 200), ("/metrics", 400), ("/", 400)):
        assert ask(named, method, path, headers=((b"host", b"10.1.2.3:8000"),)).status == status


def test_what_loopback_is():
    assert [is_loopback(h) for h in ("127.0.0.1", "127.9.9.9", "::1", "localhost")] == [True] * 4
    assert [is_loopback(h) for h in ("0.0.0.0", "::", "10.0.0.1", "example.com", "")] == [False] * 5
    Hosts(ServerConfig(host="127.9.9.9")).check({"headers": [(b"host", b"127.9.9.9:80")]})
    Hosts(ServerConfig(host="::1")).check({"headers": [(b"host", b"[::1]:80")]})


ORIGIN = (b"origin", b"https://app.example")
PREFLIGHT = (HOST, ORIGIN, (b"access-control-request-method", b"POST"), (b"access-control-request-headers", b"x-a"))


def test_s22_no_cors_by_default():
    app = guarded(api_keys=("k",))
    for method, headers in (("OPTIONS", PREFLIGHT), ("GET", (HOST, ORIGIN, bearer("k")))):
        answer = ask(app, method, headers=headers)
        assert not any(name.startswith("access-control") for name in answer.headers)
    assert ask(app, "OPTIONS", headers=PREFLIGHT).status == 401


def test_s22_cors_for_allowed_origins_only():
    app = guarded(api_keys=("k",), allowed_origins=("https://app.example",))
    preflight = ask(app, "OPTIONS", headers=PREFLIGHT)
    assert preflight.status == 200 and preflight.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-credentials" not in preflight.headers
    # Errors too must be readable for the page.
    refused = ask(app, headers=(HOST, ORIGIN))
    assert refused.status == 401 and refused.headers["access-control-allow-origin"] == "https://app.example"
    for origin in (b"https://evil.example", b"null", b"https://app.example.evil", b"http://app.example"):
        headers = (HOST, (b"origin", origin), *PREFLIGHT[2:])
        assert "access-control-allow-origin" not in ask(app, "OPTIONS", headers=headers).headers
        answer = ask(app, headers=(HOST, (b"origin", origin), bearer("k")))
        assert answer.status == 200 and "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "application/jsonp"],
)
def test_s22_no_post_without_preflight(engine, kind):
    """A web page may send these without asking first; on every route that takes a body they are refused."""
    app = create_app(engine, ServerConfig())
    body = b'{"model": "tiny", "prompt": "x", "max_tokens": 1}'
    paths = [path for path, methods in routes_of(app) if "POST" in methods]
    assert len(paths) >= 6
    for path in paths:
        headers = [HOST, (b"content-length", str(len(body)).encode())]
        if kind:
            headers.append((b"content-type", kind.encode()))
        assert ask(app, "POST", path, headers, body).status == 415


# ---------------------------------------------------------------- S19: limits


@pytest.mark.parametrize(
    "kind",
    ["application/json", "Application/JSON", "application/json; charset=utf-8", 'application/json;charset="UTF-8"'],
)
def test_json_content_types(kind):
    headers = (HOST, (b"content-type", kind.encode()), (b"content-length", b"2"))
    assert ask(guarded(), "POST", "/v1/x", headers, b"{}").status == 200


@pytest.mark.parametrize("kind", ["application/json; charset=utf-16", "application/json, text/plain", "json", "*/*"])
def test_s19_wrong_content_types(kind):
    headers = (HOST, (b"content-type", kind.encode()), (b"content-length", b"2"))
    assert ask(guarded(), "POST", "/v1/x", headers, b"{}").status == 415


def test_s19_two_content_types():
    kind = (b"content-type", b"application/json")
    assert ask(guarded(), "POST", "/v1/x", (HOST, kind, kind, (b"content-length", b"2")), b"{}").status == 415


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "identity, gzip"])
def test_s19_compressed_bodies_are_refused(coding):
    answer = post(guarded(), b"{}", (b"content-encoding", coding.encode()))
    assert answer.status == 415 and "compressed" in answer.error["message"]


def test_identity_is_no_compression():
    assert post(guarded(), b"{}", (b"content-encoding", b"identity")).status == 200


def test_s19_large_bodies():
    app, body = guarded(max_body_bytes=1000), b"{" + b" " * 998 + b"}"
    assert json.loads(post(app, body).body)["size"] == 1000
    answer = post(app, body + b" ")
    assert answer.status == 413 and answer.headers["connection"] == "close"
    assert answer.error["code"] == "body_too_large"
    # A length that lies, and none at all.
    small = (HOST, (b"content-type", b"application/json"), (b"content-length", b"5"))
    chunked = (*small[:2], (b"transfer-encoding", b"chunked"))
    for headers in (small, chunked):
        assert ask(app, "POST", "/v1/x", headers, [body, b" "]).status == 413
        assert ask(app, "POST", "/v1/x", headers, [b"{", *[b" "] * 998, b"}"]).status == 200
    assert ask(app, "GET", "/version", chunked, [body, b" "]).status == 413


@pytest.mark.parametrize("length", ["-1", "1e3", "+5", " ", "x", "٣", "5, 5", "9" * 5000, "0x10"])
def test_s19_malformed_lengths(length):
    headers = (HOST, (b"content-type", b"application/json"), (b"content-length", length.encode("utf-8")))
    assert ask(guarded(), "POST", "/v1/x", headers, b"{}").status in (400, 413)


@pytest.mark.parametrize("coding", ["gzip, chunked", "identity", "chunked, chunked", "xchunked"])
def test_s19_other_transfer_encodings(coding):
    headers = (HOST, (b"content-type", b"application/json"), (b"transfer-encoding", coding.encode()))
    assert ask(guarded(), "POST", "/v1/x", headers, b"{}").status == 400


def test_s19_headers():
    app = guarded()
    many = [(f"x-{i}".encode(), b"1") for i in range(MOST_HEADERS - 1)]
    assert ask(app, headers=(HOST, *many)).status == 200
    assert ask(app, headers=(HOST, *many, (b"x", b"1"))).status == 431
    assert ask(app, headers=(HOST, (b"x", b"y" * MOST_HEADER_BYTES))).status == 431
    assert ask(app, path="/" + "y" * MOST_HEADER_BYTES).status == 431
    assert ask(app, path="/?" + "y" * MOST_HEADER_BYTES).status == 431


def test_s19_slow_bodies_are_cut_off():
    app = guarded(body_timeout=0.2)
    answer = ask(app, "POST", "/v1/x", json_headers(b"x" * 100), [b"{", 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, b"}"])
    assert answer.status == 408 and answer.headers["connection"] == "close"
    assert ask(guarded(body_timeout=9.0), "POST", "/v1/x", json_headers(b"x" * 3), [b"{", 0.01, b"}"]).status == 200


def test_a_client_that_leaves_gets_nothing():
    assert ask(guarded(), "POST", "/v1/x", json_headers(b"x" * 100), [b"{", None]) is None


def test_s19_memory_of_bodies_is_bounded():
    """All bodies that are on their way share a budget, and give back what they took, however they end."""
    config = ServerConfig(max_body_bytes=1000)
    reader = BodyReader(config)
    whole = reader._budget
    for _ in range(16):
        reader._take(bytearray(), b" " * 1000)
    with pytest.raises(ApiError) as refused:
        reader._take(bytearray(), b" ")
    assert refused.value.status == 503 and refused.value.retry_after
    reader._budget = whole
    app = protect(echo, ServerConfig(max_body_bytes=1000))
    for chunks in ([b"{}"], [b"{" * 900, b"{" * 200], [b"{", None], [b"{", b"]"]):
        ask(app, "POST", "/v1/x", json_headers(b"12"), chunks)
        assert app._bodies._budget == whole


# ---------------------------------------------------------------- S19: JSON


def nested(depth, opening="[", closing="]"):
    return ('{"a":' + opening * (depth - 1) + closing * (depth - 1) + "}").encode()


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b' \n\t\r{"a": [1, 2, {"b": null}]}',
        nested(MOST_DEPTH).replace(b"[]", b"[1]"),
        b'{"a": "[[[[[[ {{{{ NaN Infinity \\" ]"}',
        json.dumps({"a": "[" * 100000}).encode(),
        json.dumps({"a": [[1]] * 10000}).encode(),
        json.dumps({'"': '\\"', "\\": "\\\\"}).encode(),
        '{"é": "日本"}'.encode(),
        b'{"NaN": "-Infinity"}',
    ],
)
def test_good_json_passes(body):
    json.loads(body)
    check_json(body)


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b'"text"',
        b"17",
        b"null",
        b"",
        b" ",
        b"\xef\xbb\xbf{}",
        b'{"a": NaN}',
        b'{"a": [1, -Infinity]}',
        b'{"a": "x\\\\", "b": Infinity}',
        nested(MOST_DEPTH + 1),
        nested(100_000),
        nested(100_000, '{"b":', "}").replace(b":}", b":1}"),
        b"{" * 1_000_000,
        b'{"a":' + b"[[]," * 200_000,
        b'{"a": [}',
        b'{"a": "\xff"}',
        b'{"a": "\xed\xa0\x80"}',
        b'{"a": "\0"}',
        json.dumps({"a": [[[[1]]]]}).encode("utf-16-le"),
        json.dumps({"a": 1}).encode("utf-16"),
        json.dumps({"a": 1}).encode("utf-32-le"),
    ],
)
def test_s19_bad_json_is_refused(body):
    with pytest.raises(ApiError) as refused:
        check_json(body)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 200}] * 1000},
        {"metadata": {"a": [[]] * 2_000_000}},
        {"prompt": [1] * 3_000_000},
        {f"k{i}": 0 for i in range(1_100_000)},
    ],
    ids=("parts", "lists", "numbers", "names"),
)
def test_s15_what_takes_long_to_read_is_not_read(body):
    """A body of a few megabytes would hold up everybody for seconds: its parser does not let others go on."""
    with pytest.raises(ApiError) as refused:
        check_json(json.dumps(body).encode())
    assert refused.value.code == "too_many_values"
    text = {"messages": [{"role": "user", "content": '{"a": [[], {}], ' * 100_000}], "prompt": [1] * 200_000}
    check_json(json.dumps(text).encode())


def test_s19_bad_json_is_refused_before_the_application():
    answer = post(guarded(), nested(MOST_DEPTH + 1))
    assert answer.status == 400 and answer.error["code"] == "invalid_json" and "connection" not in answer.headers


HOSTILE = (b'"', b'\\"', b'"\\', b"[", b"{[", b"[]", b'"[', b'""', b"\\", b"[[]", b"]", b"N", b"Na")


@pytest.mark.parametrize("unit", HOSTILE)
def test_s19_checking_json_takes_linear_time(unit):
    """With quadratic time these would not end today."""
    body = b"{" + unit * ((4 << 20) // len(unit))
    with pytest.raises(ApiError):
        check_json(body)
