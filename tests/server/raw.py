"""Requests without a client's good manners: straight into an ASGI application, or as bytes into a socket."""

import asyncio
import json
import socket
import threading
from contextlib import contextmanager
from typing import NamedTuple

import uvicorn

from minilora.server.guard import uvicorn_options

HOST = (b"host", b"localhost")


class Answer(NamedTuple):
    """headers: the last of each name."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self):
        """The error of an answer in OpenAI's shape."""
        found = json.loads(self.body)["error"]
        assert set(found) == {"message", "type", "param", "code"}
        return found


def ask(app, method="GET", path="/version", headers=(HOST,), body=None, root_path="", version="1.1"):
    """The Answer of an ASGI application. body: bytes, or the messages that `receive` gives, or a function for them."""
    return asyncio.run(ask_async(app, method, path, headers, body, root_path, version))


async def ask_async(app, method="GET", path="/version", headers=(HOST,), body=None, root_path="", version="1.1"):
    messages = [body] if isinstance(body, bytes) else list(body or ())
    sent = []

    async def receive():
        if not messages:
            await asyncio.sleep(3600)
        chunk = messages.pop(0)
        if chunk is None:
            return {"type": "http.disconnect"}
        if isinstance(chunk, float):
            await asyncio.sleep(chunk)
            chunk = b" "
        return {"type": "http.request", "body": chunk, "more_body": bool(messages)}

    async def send(message):
        sent.append(message)

    route, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": version,
        "method": method,
        "scheme": "http",
        "path": route,
        "raw_path": route.encode(),
        "query_string": query.encode(),
        "root_path": root_path,
        "headers": list(headers),
        "client": ("127.0.0.1", 5),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    await app(scope, receive, send)
    if not sent:
        return None
    found = {key.decode(): value.decode() for key, value in sent[0]["headers"]}
    return Answer(sent[0]["status"], found, b"".join(message.get("body", b"") for message in sent[1:]))


def bearer(key):
    return (b"authorization", f"Bearer {key}".encode("latin-1"))


def json_headers(body, *more):
    return (HOST, (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *more)


async def echo(scope, receive, send):
    """An application that tells what it was given."""
    body = b""
    while scope["method"] == "POST":
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    told = json.dumps({"path": scope["path"], "size": len(body), **scope["state"]}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(told)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": told})


@contextmanager
def listening(app, config, counted=None):
    """The port of a real server for an application, with the options that `config` wants. counted: a list for
    (route, status) of what the protocol answers by itself."""
    note = [] if counted is None else counted
    options = uvicorn_options(config, lambda *answer: note.append(answer))
    web = uvicorn.Server(uvicorn.Config(app, log_level="warning", **options))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=web.run, args=([listener],), name="web")
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            web.should_exit = True
            thread.join(30)
    assert not thread.is_alive(), "the server did not end"


def connect(port, timeout=20):
    return socket.create_connection(("127.0.0.1", port), timeout)


def read_all(connection):
    """Everything until the other side closes. Raises TimeoutError where it does not."""
    found = b""
    while True:
        try:
            data = connection.recv(1 << 16)
        except ConnectionResetError:
            return found
        if not data:
            return found
        found += data


def talk(port, data, timeout=20):
    """What a server answers to some bytes until it closes the connection."""
    with connect(port, timeout) as connection:
        connection.sendall(data)
        return read_all(connection)
