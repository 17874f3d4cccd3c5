"""A lean HTTP/1.1 client for benchmarks: one answer at a time on a connection, with the time of each piece.

It shares the machine with the server that it measures, so it does little: bytes are kept as they come and parsed when
the answer is whole.
"""

import asyncio
import json
import ssl
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httptools


@dataclass
class Answer:
    """An answer. pieces: (seconds of perf_counter's clock, bytes of the body); headers: names in lower case."""

    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> bytes:
        """All pieces together."""
        return b"".join(piece for _, piece in self.pieces)

    def events(self) -> list[tuple[float, dict]]:
        """The server-sent events with the time at which each was complete."""
        found, rest = [], b""
        for when, piece in self.pieces:
            *whole, rest = (rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
            for event in whole:
                if event.startswith(b"data:") and event[5:].strip() != b"[DONE]":
                    found.append((when, json.loads(event[5:])))
        return found


class Connection(asyncio.Protocol):
    """One connection; usable while `is_open`."""

    def __init__(self) -> None:
        self.is_open = False
        self._answer = Answer()
        self._done: asyncio.Future[None] | None = None
        self._leave_after: int | None = None

    def connection_made(self, transport) -> None:
        self._transport, self.is_open = transport, True

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"not HTTP: {error}"))
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._fail(ConnectionError(f"the server closed the connection: {error}"))

    def _fail(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    # httptools calls these.

    def on_header(self, name: bytes, value: bytes) -> None:
        self._answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        if not self.is_open:
            # More in the bytes with which the client left.
            return
        self._answer.pieces.append((self._now, body))
        if len(self._answer.pieces) == self._leave_after:
            self.close()
            self._finish()

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
        self._finish()

    def _finish(self) -> None:
        if self._done is not None and not self._done.done():
            self._answer.status = self._parser.get_status_code()
            self._done.set_result(None)

    async def send(self, request: bytes, leave_after: int | None = None) -> Answer:
        """Send a request; returns its answer, whole or up to `leave_after` pieces. Raises ConnectionError."""
        self._answer, self._parser = Answer(), httptools.HttpResponseParser(self)
        self._leave_after = leave_after
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        await self._done
        return self._answer

    def close(self) -> None:
        self.is_open = False
        self._transport.close()


class Client:
    """A server's address and the connections to it, which are reused."""

    def __init__(self, base_url: str, api_key: str | None = None):
        parts = urlsplit(base_url)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname, parts.port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/")
        self._headers = f"Host: {parts.netloc}\r\nAccept: */*\r\n"
        if api_key:
            self._headers += f"Authorization: Bearer {api_key}\r\n"
        self._idle: list[Connection] = []

    def request(self, path: str, content: dict | None = None) -> bytes:
        """The bytes of a POST of a JSON document, or of a GET without one."""
        body = b"" if content is None else json.dumps(content).encode()
        method = "GET" if content is None else "POST"
        lines = f"{method} {self._path}{path} HTTP/1.1\r\n{self._headers}"
        if content is not None:
            lines += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        return lines.encode() + b"\r\n" + body

    async def send(self, request: bytes, leave_after: int | None = None) -> Answer:
        """Send a request on an idle connection or a new one. leave_after: close it after so many pieces of the
        answer, as a client that leaves. Raises OSError."""
        connection = await self._connect()
        try:
            answer = await connection.send(request, leave_after)
        except BaseException:
            connection.close()
            raise
        if connection.is_open:
            self._idle.append(connection)
        return answer

    async def _connect(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self._host, self._port, ssl=self._tls)
        return connection

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
