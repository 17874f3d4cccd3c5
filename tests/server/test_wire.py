"""Malformed and hostile HTTP, as bytes into a real server's socket. After each attack it answers as before."""

import asyncio
import json
import socket
import ssl
import threading
import time

import httpx
import pytest

from minilora.errors import ResourceError
from minilora.server import ServerConfig, wire
from minilora.server.guard import protect

from .raw import connect, echo, listening, read_all, talk

BODY = b'{"model": "x"}'
GOOD = b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
HEAD = b"POST /v1/x HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
LIMITS = {"header_timeout": 0.6, "body_timeout": 0.6, "keep_alive": 0.6, "write_timeout": 0.6, "max_body_bytes": 5000}


@pytest.fixture(scope="module")
def port():
    config = ServerConfig(**LIMITS)
    with listening(protect(echo, config), config) as port:
        yield port


@pytest.fixture(autouse=True)
def healthy_afterwards(port, caplog):
    """The server serves on, and no attacker writes into its log."""
    yield
    assert statuses(talk(port, GOOD)) == [200]
    assert not [record for record in caplog.records if record.name.startswith(("uvicorn", "asyncio", "minilora"))]


def statuses(data):
    """The status of each answer in a stream of them; every one must be complete and in our shape."""
    found = []
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        line, *headers = head.split(b"\r\n")
        version, status, _ = line.split(b" ", 2)
        assert version == b"HTTP/1.1"
        lengths = [int(h.split(b":")[1]) for h in headers if h.lower().startswith(b"content-length:")]
        assert len(lengths) == 1 and len(rest) >= lengths[0]
        told = json.loads(rest[: lengths[0]])
        assert set(told) == {"error"} or int(status) == 200
        found.append(int(status))
        data = rest[lengths[0] :]
    return found


def post(body=BODY, length=None, more=b""):
    return HEAD + more + b"Content-Length: %d\r\n\r\n" % (len(body) if length is None else length) + body


# ---------------------------------------------------------------- syntax


MALFORMED = {
    "no http": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "binary": bytes(range(256)) * 4,
    "nul in the path": b"GET /ver\0sion HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "nul in a header": b"GET /version HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n",
    "nul in a header's name": b"GET /version HTTP/1.1\r\nHost: localhost\r\nX\0Y: a\r\n\r\n",
    "control character": b"GET /version HTTP/1.1\r\nHost: localhost\r\nX: a\x01b\r\n\r\n",
    "no version": b"GET /version\r\nHost: localhost\r\n\r\n",
    "wrong version": b"GET /version HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "no method": b" /version HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "unknown method": b"GETT /version HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "space before the colon": b"GET /version HTTP/1.1\r\nHost : localhost\r\n\r\n",
    "header without a colon": b"GET /version HTTP/1.1\r\nHost: localhost\r\nnothing\r\n\r\n",
    "bare carriage return": b"GET /version HTTP/1.1\r\nHost: localhost\r\nX: a\rY: b\r\n\r\n",
    "umlaut in the path": "GET /vérsion HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(),
    "line before": b"nonsense\r\n" + GOOD,
    "negative length": post(length=-1),
    "length in words": HEAD + b"Content-Length: many\r\n\r\n{}",
    "length in hex": HEAD + b"Content-Length: 0x2\r\n\r\n{}",
    "length with a plus": HEAD + b"Content-Length: +2\r\n\r\n{}",
    "length beyond 64 bits": HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n{}",
    "two lengths": HEAD + b"Content-Length: 2\r\nContent-Length: 5\r\n\r\n{}",
    "length and chunked": HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "chunked and length": HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "chunked not last": HEAD + b"Transfer-Encoding: chunked, gzip\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "gzip": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "chunk of no size": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "chunk of negative size": HEAD + b"Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n",
    "chunk beyond 64 bits": HEAD + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffffff\r\n{}\r\n0\r\n\r\n",
    "chunk longer than its size": HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{}\r\n0\r\n\r\n",
    "no host": b"GET /version HTTP/1.1\r\nConnection: close\r\n\r\n",
    "two hosts": b"GET /version HTTP/1.1\r\nHost: localhost\r\nHost: a\r\nConnection: close\r\n\r\n",
    "connect": b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "http 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(50),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_requests_are_refused(port, name):
    found = statuses(talk(port, MALFORMED[name]))
    assert found in ([400], [413], [431]), found


@pytest.mark.parametrize("cut", [0, 1, 3, 20, 60, len(post()) - len(BODY) - 1, len(post()) - 5, len(post()) - 1])
def test_truncated_requests(port, cut):
    """Whatever is missing, the server closes: at once where the client does, else when the time is over."""
    with connect(port) as connection:
        connection.sendall(post()[:cut])
        connection.shutdown(socket.SHUT_WR)
        assert statuses(read_all(connection)) in ([], [408])
    with connect(port) as connection:
        connection.sendall(post()[:cut])
        assert statuses(read_all(connection)) == ([408] if cut else [])


def test_clients_that_vanish(port):
    for cut in range(0, len(post()), 7):
        with connect(port) as connection:
            connection.sendall(post()[:cut])
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def test_absolute_urls_and_escapes(port):
    def path(target):
        return json.loads(
            talk(port, b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % target).split(b"\r\n\r\n")[
                1
            ]
        )["path"]

    assert path(b"http://evil.example/version?x") == "/version"
    assert path(b"/v1/%2e%2e/health") == "/v1/../health"
    assert path(b"/v1%2fmodels") == "/v1/models"
    assert path(b"//v1/models") == "//v1/models"
    assert path(b"/a%20b%ff") == "/a b\ufffd"
    assert b" 404 " in talk(port, b"GET /version%0A HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")


# ---------------------------------------------------------------- sizes


FLOODS = {
    "headers": b"X: " + b"a" * 1000 + b"\r\n",
    "empty headers": b"X:\r\n" * 250,
    "a name": b"a" * 1000,
    "a value": b"X: " + b"a" * 1000,
    "folded lines": b"X: a\r\n" + b" a\r\n" * 250,
}


@pytest.mark.parametrize("kind", FLOODS)
@pytest.mark.parametrize("size", [1, 1000])
def test_s19_headers_are_bounded_while_they_come(kind, size):
    """With all the time in the world: what is kept of headers does not grow with what is sent."""
    config, flood = ServerConfig(header_timeout=600.0), FLOODS[kind]
    with listening(protect(echo, config), config) as port, connect(port) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\n")
        sent = 0
        with pytest.raises(OSError):
            while sent < 64 << 20:
                sent += connection.send(flood * size)
                if kind == "a value":
                    flood = b"a" * 1000
        # The rest lies in the buffers of both sockets.
        assert sent < 16 << 20


def test_s19_a_path_is_bounded_while_it_comes():
    config = ServerConfig(header_timeout=600.0)
    with listening(protect(echo, config), config) as port, connect(port) as connection:
        connection.sendall(b"GET /")
        sent = 0
        with pytest.raises(OSError):
            while sent < 64 << 20:
                sent += connection.send(b"a" * 10_000)
        assert sent < 16 << 20


def test_trailers_are_no_headers(port):
    """Whatever follows a body can neither name a host nor bring a key."""
    chunks = b"%x\r\n%s\r\n0\r\n" % (len(BODY), BODY)
    start = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks
    assert statuses(talk(port, start + b"Host: evil.example\r\nContent-Encoding: gzip\r\n\r\n")) == [200]
    assert statuses(talk(port, start + b"X: a\r\n" * 50_000 + b"\r\n")) in ([200], [431])


def test_a_large_body_is_not_taken_for_headers():
    config = ServerConfig()
    body = b'{"a": "%s"}' % (b"x" * 3_000_000)
    with listening(protect(echo, config), config) as port:
        assert statuses(talk(port, (post(body) + post()) * 2 + GOOD)) == [200] * 5


def test_s19_huge_headers_get_an_answer(port):
    assert statuses(talk(port, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: %s\r\n\r\n" % (b"a" * 40_000))) == [431]
    assert statuses(talk(port, b"GET / HTTP/1.1\r\nHost: localhost\r\n%s\r\n" % (b"X: 1\r\n" * 101))) == [431]
    assert statuses(talk(port, b"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n" % (b"a" * 40_000))) == [431]


def test_s19_large_bodies_are_told_so(port):
    """A client that sends it all before it listens gets the answer too."""
    for size in (5001, 1 << 20, 20 << 20):
        answer = httpx.post(f"http://localhost:{port}/v1/x", content=b"{" * size, headers=JSON, trust_env=False)
        assert answer.status_code == 413 and answer.headers["connection"] == "close"

        def chunks(size=size):
            for _ in range(size // 1000 + 1):
                yield b" " * 1000

        answer = httpx.post(f"http://localhost:{port}/v1/x", content=chunks(), headers=JSON, trust_env=False)
        assert answer.status_code == 413


JSON = {"Content-Type": "application/json"}


def test_bodies_in_any_pieces(port):
    chunked = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
    data = HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked
    for step in (1, 3, 1000):
        with connect(port) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for i in range(0, len(data), step):
                connection.sendall(data[i : i + step])
            answer = read_all(connection)
        assert statuses(answer) == [200] and b'"size": %d' % len(BODY) in answer


def test_expect_100_continue(port):
    with connect(port) as connection:
        connection.sendall(post(b"", len(BODY), b"Expect: 100-continue\r\nConnection: close\r\n"))
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(BODY)
        assert statuses(read_all(connection)) == [200]
    # One that would be too large is not asked for.
    assert statuses(talk(port, post(b"", 5001, b"Expect: 100-continue\r\n"))) == [413]


# ---------------------------------------------------------------- time


def test_s19_slowloris(port):
    """One byte at a time keeps a connection no longer than it may take for its headers, or its body."""
    for data, status in ((GOOD.replace(b"close", b"close" + b"e" * 500), 408), (post(b"{" * 500), 408)):
        started = time.monotonic()
        with connect(port) as connection:
            body = data.find(b"\r\n\r\n") + 4
            connection.sendall(data[:body] if data.startswith(b"POST") else b"")
            answer = _drip(connection, data[body:] if data.startswith(b"POST") else data)
        assert statuses(answer) == [status]
        assert time.monotonic() - started < 10


def _drip(connection, data):
    """Send byte by byte until the other side closes; what it said."""
    connection.settimeout(0.02)
    found = b""
    for byte in data:
        try:
            connection.send(bytes([byte]))
            piece = connection.recv(1 << 16)
            if not piece:
                return found
            found += piece
        except TimeoutError:
            continue
        except OSError:
            return found
    raise AssertionError("the connection is still open")


@pytest.mark.parametrize("start", [b"", b"\r\n", GOOD.replace(b"close", b"keep-alive")])
def test_s19_idle_connections_are_closed(port, start):
    """Even those that send an empty line from time to time."""
    with connect(port) as connection:
        connection.sendall(start)
        answer = _drip(connection, b"\r\n" * 500)
    assert statuses(answer) in ([], [200], [408], [200, 408])


def test_s19_many_slow_clients_do_not_stop_others(port):
    slow = [connect(port) for _ in range(100)]
    try:
        for connection in slow:
            connection.sendall(b"GET /version HTTP/1.1\r\nHo")
        assert statuses(talk(port, GOOD)) == [200]
        assert all(statuses(read_all(connection)) == [408] for connection in slow)
    finally:
        for connection in slow:
            connection.close()


def test_a_client_that_does_not_read_is_dropped():
    config = ServerConfig(**LIMITS)
    left = threading.Event()

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(10_000):
            await send({"type": "http.response.body", "body": b"x" * 60_000, "more_body": True})
            if (await _soon(receive)) == "http.disconnect":
                left.set()
                return

    with listening(protect(app, config), config) as port, connect(port) as connection:
        connection.sendall(GOOD)
        assert left.wait(20), "the answer still waits for its reader"


async def _soon(receive):
    """The next message's type, if it is there."""
    try:
        return (await asyncio.wait_for(receive(), 0.001))["type"]
    except TimeoutError:
        return None


# ---------------------------------------------------------------- more than one request


def test_pipelined_requests_are_answered_in_order(port):
    requests = [b"GET /r%d HTTP/1.1\r\nHost: localhost\r\n\r\n" % i for i in range(50)]
    answer = talk(port, b"".join(requests) + GOOD)
    assert statuses(answer) == [200] * 51
    assert [f"/r{i}".encode() in answer for i in range(50)] == [True] * 50
    assert answer.find(b"/r7") < answer.find(b"/r8") < answer.find(b"/r49")


def test_pipelined_bodies_are_kept_apart(port):
    bodies = [b'{"a": "%s"}' % (b"x" * i) for i in range(20)]
    answer = talk(port, b"".join(post(body) for body in bodies) + GOOD)
    sizes = [json.loads(part.split(b"HTTP/1.1")[0])["size"] for part in answer.split(b"\r\n\r\n")[1:-1]]
    assert statuses(answer) == [200] * 21 and sizes == [len(body) for body in bodies]


@pytest.mark.parametrize("nonsense", [b"\0\1\2\r\n\r\n", b"GET", b"GETT / HTTP/1.1\r\n\r\n", b"\r\n"])
def test_nonsense_after_a_request(port, nonsense):
    """What was asked properly is answered properly; then the connection ends."""
    assert statuses(talk(port, post() + nonsense)) in ([200], [200, 408])


def test_what_comes_behind_a_request_does_not_cut_its_answer_off():
    """The time for headers is long over when the slow answer ends."""

    async def slow(scope, receive, send):
        await asyncio.sleep(2 * LIMITS["header_timeout"])
        await echo({**scope, "method": "GET"}, receive, send)

    config = ServerConfig(**LIMITS)
    with listening(protect(slow, config), config) as port:
        for behind in (b"\r\n", b"GET /ver", b"\0"):
            with connect(port) as connection:
                connection.sendall(post())
                time.sleep(0.1)
                connection.sendall(behind)
                assert statuses(read_all(connection)) == [200]


def test_a_body_smuggles_no_request(port):
    inner = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
    body = b'{"a": "' + inner.replace(b"\r\n", b"  ") + b'"}'
    assert statuses(talk(port, post(body, more=b"Connection: close\r\n"))) == [200]
    refused = talk(port, post(BODY, 5001) + inner)
    assert statuses(refused) == [413] and b"smuggled" not in refused


@pytest.mark.parametrize("protocol", [b"websocket", b"h2c", b"foo"])
def test_upgrades_are_not_taken(port, protocol):
    """Clients that offer HTTP/2 in a request are served by HTTP/1.1, with their body."""
    more = b"Connection: Upgrade\r\nUpgrade: %s\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n" % protocol
    assert statuses(talk(port, GOOD.replace(b"Connection: close\r\n", more))) == [200]
    answer = talk(port, post(more=more) * 500 + GOOD)
    assert statuses(answer) == [200] * 501 and answer.count(b'"size": %d' % len(BODY)) == 500


# ---------------------------------------------------------------- too many


def test_too_many_connections_are_told_so(monkeypatch):
    monkeypatch.setattr(wire, "MORE_CONNECTIONS", 5)
    config = ServerConfig(**{**LIMITS, "header_timeout": 20.0}, max_connections=10)
    with listening(protect(echo, config), config) as port:
        idle = [connect(port) for _ in range(10)]
        time.sleep(0.2)
        answer = talk(port, GOOD)
        assert statuses(answer) == [503] and b"\r\nretry-after: 1\r\n" in answer.lower()
        more = [connect(port) for _ in range(5)]
        time.sleep(0.2)
        assert talk(port, GOOD) == b""
        for connection in (*idle, *more):
            connection.close()
        time.sleep(0.2)
        assert statuses(talk(port, GOOD)) == [200]


def test_connections_without_a_tls_handshake_are_bounded_too(monkeypatch, certificate):
    """They count like others, and their time is the headers'."""
    monkeypatch.setattr(wire, "MORE_CONNECTIONS", 2)
    context = ssl.create_default_context(cafile=certificate[0])
    files = {"ssl_certfile": str(certificate[0]), "ssl_keyfile": str(certificate[1])}
    config = ServerConfig(**LIMITS, **files, max_connections=3)

    def get(port):
        with connect(port) as plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
            connection.sendall(GOOD)
            return read_all(connection)

    with listening(protect(echo, config), config) as port:
        idle = [connect(port) for _ in range(5)]
        time.sleep(0.2)
        with pytest.raises(OSError):
            get(port)
        started = time.monotonic()
        assert [read_all(connection) for connection in idle] == [b""] * 5
        assert time.monotonic() - started < 10 * LIMITS["header_timeout"]
        assert statuses(talk(port, b"no handshake\r\n\r\n") or get(port)) == [200]
        for connection in idle:
            connection.close()


def test_answers_that_no_route_gives_are_counted():
    config, counted = ServerConfig(**LIMITS, max_connections=1), []
    with listening(protect(echo, config), config, counted) as port:
        talk(port, GOOD)
        talk(port, b"nonsense\r\n\r\n")
        talk(port, GOOD[:20])
        talk(port, b"GET / HTTP/1.1\r\n" + b"X: 1\r\n" * 300)
        with connect(port):
            talk(port, GOOD)
    assert counted == [("other", status) for status in (400, 408, 431, 503)]


@pytest.mark.parametrize(
    ("soft", "hard", "expected"),
    [
        (1024, 4096, (3584, 4096)),
        (1024, -1, (3584, -1)),
        (1024, 2000, (2000, 2000)),
        (3584, 4096, None),
        (-1, -1, None),
        (256, 1000, "error"),
    ],
)
def test_open_files_are_allowed_for(monkeypatch, soft, hard, expected):
    monkeypatch.setattr(wire.resource, "RLIM_INFINITY", -1)
    monkeypatch.setattr(wire.resource, "getrlimit", lambda kind: (soft, hard))
    given = []
    monkeypatch.setattr(wire.resource, "setrlimit", lambda kind, limits: given.append(limits))
    if expected == "error":
        with pytest.raises(ResourceError, match="of 1000 that are allowed"):
            wire.allow_connections(ServerConfig())
    else:
        wire.allow_connections(ServerConfig())
    assert given == ([expected] if isinstance(expected, tuple) else [])
