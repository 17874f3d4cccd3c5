"""The HTTP protocol of one connection: uvicorn's, with limits on what ASGI never gets to see.

Its parser is in C and takes headers of any length, for as long as a client likes to send them, and an answer waits
forever for a client that does not read.
"""

import asyncio
import contextlib
import resource
import ssl
from collections.abc import Callable
from typing import Any

import httptools
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from ..errors import ResourceError, UsageError
from .failures import ApiError, failure_of
from .settings import ServerConfig

# Above the guard's limits, which say what is wrong: here the request line and chunk extensions count too.
MOST_HEADERS = 200
MOST_HEADER_BYTES = 64 << 10
# Connections that wait in the kernel to be taken.
BACKLOG = 512
# Connections above max_connections that get an answer, and not just their end.
MORE_CONNECTIONS = 256
# Files that a process has open beside connections: the model's, adapters that are being read, the event loop's.
OTHER_FILES = 256
# Connections that asyncio takes before it hears that they are refused: in each turn all that wait, for some turns.
ON_THEIR_WAY = 4 * BACKLOG

# Called with each answer's route, as it is written in the program, and status; for what no route answers it is OTHER.
Count = Callable[[str, int], None]
OTHER = "other"

MALFORMED = ApiError(400, "the request is not valid HTTP", None, "invalid_http")


class BoundedProtocol(HttpToolsProtocol):
    """One connection. limits, count, tls: set by `make_protocol`."""

    limits: ServerConfig
    count: Count
    tls: ssl.SSLContext | None

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        # Whether a request's headers are expected, have begun, and how many bytes of them are here; its number.
        self._in_headers, self._begun, self._header_bytes, self._request = True, False, 0, 0
        self._fault = MALFORMED
        self._timers: dict[str, asyncio.TimerHandle] = {}
        # While TLS is negotiated; what comes right behind it.
        self._handshake: asyncio.Task[None] | None = None
        self._early = b""

    # ------------------------------------------------------------ connections

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection if there are not too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections + MORE_CONNECTIONS:
            transport.abort()
        elif self.tls is None:
            self._start("headers", self.limits.header_timeout, self._give_up)
        else:
            # asyncio's servers do it before they make the connection, which nobody counts then.
            transport.pause_reading()
            self._handshake = self.loop.create_task(self._secure(transport, self.tls))

    async def _secure(self, transport: asyncio.Transport, tls: ssl.SSLContext) -> None:
        """The TLS handshake, for which there is as much time as for headers."""
        secured: asyncio.Transport | None = None
        with contextlib.suppress(OSError):
            secured = await self.loop.start_tls(
                transport, self, tls, server_side=True, ssl_handshake_timeout=self.limits.header_timeout
            )
        if secured is None or secured.is_closing():
            self.connections.discard(self)
            transport.abort()
            return
        self._handshake = None
        super().connection_made(secured)
        self._start("headers", self.limits.header_timeout, self._give_up)
        self.data_received(self._early)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note its end."""
        for name in list(self._timers):
            self._stop(name)
        super().connection_lost(exc)

    def _start(self, name: str, seconds: float, act: Any) -> None:
        if name not in self._timers:
            self._timers[name] = self.loop.call_later(seconds, act)

    def _stop(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()

    # ------------------------------------------------------------ requests

    def data_received(self, data: bytes) -> None:
        """Parse; what is not part of a body has to become a whole request in time."""
        if self._handshake is not None:
            self._early += data
            return
        self._unset_keepalive_if_required()
        if self._in_headers:
            self._start("headers", self.limits.header_timeout, self._give_up)
        while data:
            before = self._request if self._begun else None
            try:
                self.parser.feed_data(data)
                # The parser tells of a header when it is whole; all of this data is of one that is not.
                if self._begun and self._request == before:
                    self._count(len(data))
                return
            except httptools.HttpParserUpgrade as offer:
                data = self._without_offer(data[offer.args[0] :])
            except httptools.HttpParserError:
                self.send_400_response("")
                return

    def _without_offer(self, rest: bytes) -> bytes:
        """A request that offers another protocol, and what came after its headers, to be parsed once more.

        The parser believes that what follows the headers is of that protocol. But HTTP clients offer HTTP/2 in
        ordinary requests with ordinary bodies, Java's for one.
        """
        lines = [b"%s: %s\r\n" % pair for pair in self.headers if pair[0] != b"upgrade"]
        version = self.parser.get_http_version().encode()
        start = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, version)
        return b"".join([start, *lines, b"\r\n", rest])

    def _give_up(self) -> None:
        """The headers did not come in time."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
        elif self._begun:
            self._fault = ApiError(408, "the headers did not arrive in time", None, "request_timeout")
            self.send_400_response("")
        else:
            self.transport.close()

    def on_message_begin(self) -> None:
        """The parser found the beginning of a request."""
        super().on_message_begin()
        self._in_headers, self._begun, self._header_bytes = True, True, 0
        self._request += 1

    def on_url(self, url: bytes) -> None:
        """The parser found some of the path."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """The parser found a header, or one of those after a body, which nobody needs."""
        self._count(len(name) + len(value))
        if self._begun:
            super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MOST_HEADER_BYTES or len(self.headers) > MOST_HEADERS:
            self._fault = ApiError(431, "the headers and the path are too long", None, "headers_too_large")
            raise httptools.HttpParserError("too long")

    def on_headers_complete(self) -> None:
        """The parser found the end of the headers: the request begins."""
        if self.parser.get_http_version() not in ("1.0", "1.1") or self.parser.get_method() == b"CONNECT":
            raise httptools.HttpParserError("not for us")
        if self.parser.should_upgrade():
            return
        self._in_headers = self._begun = False
        self._stop("headers")
        if len(self.connections) > self.limits.max_connections:
            self.app = self._crowded
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The parser found the end of a request."""
        if not self.parser.should_upgrade():
            super().on_message_complete()
            self._in_headers = True

    # ------------------------------------------------------------ answers

    def send_400_response(self, msg: str) -> None:
        """Answer what is no proper request, and end the connection, after answers to what came before."""
        cycle = self.cycle
        if self.transport.is_closing():
            return
        if cycle is not None and not cycle.response_complete and not cycle.more_body:
            cycle.keep_alive = False
            return
        if cycle is None or cycle.response_complete or not (cycle.response_started or self.pipeline):
            response = failure_of(self._fault).response()
            head = [STATUS_LINE[self._fault.status], *(b"%s: %s\r\n" % pair for pair in response.raw_headers)]
            self.transport.write(b"".join([*head, b"connection: close\r\n\r\n", bytes(response.body)]))
            self.count(OTHER, self._fault.status)
        if cycle is not None:
            cycle.disconnected = True
        self.transport.close()

    async def _crowded(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application for connections above the limit."""
        response = ApiError(503, "too many connections", None, "overloaded", retry_after=1).response()
        response.headers["connection"] = "close"
        self.count(OTHER, response.status_code)
        await response(scope, receive, send)

    def pause_writing(self) -> None:
        """The client does not read as fast as we write."""
        super().pause_writing()
        self._start("writing", self.limits.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        self._stop("writing")


def make_protocol(config: ServerConfig, count: Count) -> type[BoundedProtocol]:
    """The protocol for uvicorn's option `http`. It does TLS too, where that is wanted."""
    own = {"limits": config, "count": staticmethod(count), "tls": tls_context(config)}
    return type("Protocol", (BoundedProtocol,), own)


def tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    """The certificate and its key; None where none are given. Raises UsageError."""
    if config.ssl_certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
    except OSError as error:
        raise UsageError(f"ssl_certfile and ssl_keyfile can't be used: {error.strerror or error}") from None
    return context


def allow_connections(config: ServerConfig) -> None:
    """Let this process open as many files as connections need. Raises ResourceError where the system says no."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = config.max_connections + MORE_CONNECTIONS + OTHER_FILES
    wanted = needed + ON_THEIR_WAY
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ResourceError(
            f"max_connections is {config.max_connections}: that takes {needed} open files, of {hard} that are allowed",
            "Lower --max-connections, or raise the limit (ulimit -n).",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
