"""The body of a request: read within limits of size, time and memory, and looked at before a parser sees it."""

import asyncio
import re
from collections.abc import Iterable

from starlette.types import Message, Receive

from .failures import ApiError, draining
from .settings import ServerConfig

MOST_DEPTH = 64
# Lists and objects, and values, of a body: what reads and checks them holds up all other requests meanwhile.
MOST_LISTS, MOST_VALUES = 1 << 14, 1 << 20
# Bytes of all bodies that are being read at the same time, in multiples of the largest one.
MOST_AT_ONCE = 16
# Of a body that is refused: seconds and bytes that are still taken, so that the client gets to read the answer.
LINGER_SECONDS = 1.0
LINGER_BYTES = 64 << 20

JSON = re.compile(r"application/json\s*(;\s*charset\s*=\s*\"?utf-8\"?\s*)?", re.IGNORECASE)
# A string, or the rest of the text where it has no end: every character is looked at once.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NO_NUMBER = re.compile(rb"NaN|Infinity")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SQUARE = bytes.maketrans(b"{}", b"[]")

Headers = Iterable[tuple[bytes, bytes]]


class Gone(Exception):  # noqa: N818 (the end of a connection is no error)
    """The client has left."""


def values(headers: Headers, name: bytes) -> list[str]:
    """All values of a header."""
    return [value.decode("latin-1").strip() for key, value in headers if key == name]


def has_body(headers: Headers) -> bool:
    """Whether a request announces a body."""
    return bool(values(headers, b"transfer-encoding")) or any(n != "0" for n in values(headers, b"content-length"))


class BodyReader:
    """Reads bodies, within one budget of memory for all that are on their way."""

    def __init__(self, config: ServerConfig):
        self._most, self._seconds = config.max_body_bytes, config.body_timeout
        self._budget = MOST_AT_ONCE * self._most
        # Of the bodies that are on their way.
        self._deadlines: set[asyncio.Timeout] = set()
        self._ended = False

    async def read(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body. Raises ApiError where it is not declared as JSON, too large or too slow; Gone."""
        self._check_headers(headers)
        body, deadline = bytearray(), asyncio.timeout(0 if self._ended else self._seconds)
        self._deadlines.add(deadline)
        try:
            async with deadline:
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise Gone
                    self._take(body, message.get("body", b""))
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            if self._ended:
                raise draining() from None
            raise ApiError(408, f"the body did not arrive within {self._seconds:g} seconds") from None
        finally:
            self._deadlines.discard(deadline)
            self._budget += len(body)

    def end(self) -> None:
        """Wait for no more of any body, as the server ends: clients that still send one are told."""
        self._ended = True
        for deadline in self._deadlines:
            deadline.reschedule(asyncio.get_running_loop().time())

    def _take(self, body: bytearray, chunk: bytes) -> None:
        self._check_size(len(body) + len(chunk))
        if len(chunk) > self._budget:
            raise ApiError(503, "too many large requests at once", None, "overloaded", retry_after=1)
        self._budget -= len(chunk)
        body += chunk

    def _check_headers(self, headers: Headers) -> None:
        if any(coding.lower() != "identity" for coding in values(headers, b"content-encoding")):
            raise ApiError(415, "compressed bodies are not accepted; send the body without Content-Encoding")
        if [coding.lower() for coding in values(headers, b"transfer-encoding")] not in ([], ["chunked"]):
            raise ApiError(400, "the only Transfer-Encoding accepted is chunked")
        kinds, lengths = values(headers, b"content-type"), values(headers, b"content-length")
        if len(kinds) != 1 or not JSON.fullmatch(kinds[0]):
            raise ApiError(415, "the body must be JSON in UTF-8, with Content-Type application/json")
        if len(lengths) > 1 or not all(length.isascii() and length.isdecimal() for length in lengths):
            raise ApiError(400, "the Content-Length is malformed")
        # Python refuses to read numbers of thousands of digits.
        self._check_size(max((int(length[:20]) for length in lengths), default=0))

    def _check_size(self, size: int) -> None:
        if size > self._most:
            raise ApiError(413, f"the body is larger than {self._most} bytes", None, "body_too_large")


def check_json(body: bytes) -> None:
    """Raise ApiError unless this can be a JSON object in UTF-8, of finite numbers, nested at most MOST_DEPTH deep, of
    at most MOST_LISTS lists and objects and MOST_VALUES values.

    Takes time linear in the body. Whether it is well-formed is for the parser to say.
    """
    try:
        body.decode()
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8", None, "invalid_json") from None
    if b"\0" in body or body.lstrip(b" \t\r\n")[:1] != b"{":
        raise ApiError(400, "the body must be a JSON object", None, "invalid_json")
    outside = _STRING.sub(b"", body)
    if _NO_NUMBER.search(outside):
        raise ApiError(400, "NaN and Infinity are not JSON", None, "invalid_json")
    if outside.count(b"[") + outside.count(b"{") > MOST_LISTS or outside.count(b",") > MOST_VALUES:
        cause = f"the body holds more than {MOST_LISTS} lists and objects, or {MOST_VALUES} values"
        raise ApiError(400, cause, None, "too_many_values")
    if not is_shallow(outside.translate(None, _NO_BRACKETS).translate(_SQUARE), MOST_DEPTH):
        cause = f"the JSON is nested more than {MOST_DEPTH} deep, or its brackets do not match"
        raise ApiError(400, cause, None, "invalid_json")


def is_shallow(brackets: bytes, most: int) -> bool:
    """Whether square brackets match and are nested at most so deep: each turn takes the innermost pairs away."""
    for _ in range(most):
        if not brackets or b"[" * (most + 1) in brackets:
            break
        brackets = brackets.replace(b"[]", b"")
    return not brackets


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body at once, and then what comes after it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


async def linger(receive: Receive) -> None:
    """Take some more of a body that nobody wants: a connection that is closed under a client loses its answer."""
    taken = 0
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            while taken < LINGER_BYTES:
                message = await receive()
                if not message.get("more_body", False):
                    return
                taken += len(message.get("body", b""))
    except TimeoutError:
        return
