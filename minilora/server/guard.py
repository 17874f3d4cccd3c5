"""What every request must pass before any route sees it: limits, Host, API key, body.

Pure ASGI, around the whole application, so that a path that no route has is guarded like any other. The key is wanted
unless the router's own view of the path is one of the few open ones: a path in disguise is never open.
"""

import hashlib
import hmac
import ipaddress
import os
import re
from typing import Any

from starlette._utils import get_route_path
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .body import BodyReader, Gone, check_json, has_body, linger, replay, values
from .failures import ApiError, failure_of
from .settings import ServerConfig
from .wire import BACKLOG, OTHER, Count, make_protocol

MOST_HEADERS = 100
MOST_HEADER_BYTES = 32 << 10

PROBES = {"/health", "/ready"}
PAGE = re.compile(r"/|/page/[A-Za-z0-9_-][A-Za-z0-9_.-]*")
# No route has them, but a route's pattern takes a line feed at the end.
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

LOOPBACK = {"localhost", "127.0.0.1", "[::1]"}
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")


def protect(
    app: ASGIApp, config: ServerConfig, count: Count | None = None, bodies: BodyReader | None = None
) -> ASGIApp:
    """An application that lets only proper requests through to `app`.

    It leaves the caller in scope["state"]: `key`, a short digest of the API key that differs from start to start, ""
    where none is asked for, and `admin`, whether it has an admin's key; routes that want one look at that themselves.
    """
    guard = Guard(app, config, count, bodies)
    if not config.allowed_origins:
        return guard
    return CORSMiddleware(
        guard,
        allow_origins=config.allowed_origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=("Retry-After", "X-Request-Id"),
    )


def uvicorn_options(config: ServerConfig, count: Count) -> dict[str, Any]:
    """How to set up uvicorn so that what reaches the guard is bounded too. count: called for answers to the rest."""
    return {
        "http": make_protocol(config, count),
        "ws": "none",
        "lifespan": "off",
        "server_header": False,
        "root_path": config.root_path,
        # X-Forwarded-For is not trusted: it would let anybody on this machine choose an address.
        "proxy_headers": False,
        "timeout_keep_alive": config.keep_alive,
        # The protocol answers those above max_connections, with Retry-After; these wait in the kernel.
        "limit_concurrency": None,
        "backlog": BACKLOG,
    }


class Guard:
    """The middleware itself; `protect` makes it."""

    def __init__(
        self, app: ASGIApp, config: ServerConfig, count: Count | None = None, bodies: BodyReader | None = None
    ):
        self.app, self.config = app, config
        self._hosts, self._keys = Hosts(config), Keys(config.api_keys, config.admin_keys)
        self._bodies = bodies or BodyReader(config)
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await self._serve(scope, receive, self._counted(scope, send))
        else:
            await self.app(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        unread = has_body(scope["headers"])
        try:
            check_headers(scope)
            if not _is_probe(get_route_path(scope), scope["method"]):
                self._hosts.check(scope)
            self._identify(scope)
            if _CONTROL.search(scope["path"]):
                raise ApiError(404, "no route has control characters in its path")
            if unread:
                body = await self._bodies.read(scope["headers"], receive)
                unread, receive = False, replay(body, receive)
                check_json(body)
        except Gone:
            return
        except ApiError as refusal:
            await refuse(refusal, unread, receive, send)
            return
        await self.app(scope, receive, send)

    def _identify(self, scope: Scope) -> None:
        """Find out who asks; raise ApiError where this caller may not."""
        given = values(scope["headers"], b"authorization")
        caller = self._keys.find(given)
        path = get_route_path(scope)
        if caller is None and not self._is_open(path, scope["method"]):
            cause = "the API key is not one of this server's" if given else "this server needs an API key"
            raise ApiError(401, f"{cause}: send 'Authorization: Bearer KEY'", None, "invalid_api_key")
        key, admin = caller or ("", False)
        scope.setdefault("state", {}).update(key=key, admin=admin)

    def _is_open(self, path: str, method: str) -> bool:
        page = self.config.enable_page and method in ("GET", "HEAD") and PAGE.fullmatch(path) is not None
        return page or _is_probe(path, method)

    def _counted(self, scope: Scope, send: Send) -> Send:
        if self._count is None:
            return send
        count = self._count

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Only routes of the program have names here: clients must not be able to make new ones.
                count(getattr(scope.get("route"), "path", OTHER), message["status"])
            await send(message)

        return counting


def _is_probe(path: str, method: str) -> bool:
    """Whether a request only asks if the server lives: under any name, as Kubernetes uses its address."""
    return path in PROBES and method in ("GET", "HEAD")


async def refuse(refusal: ApiError, unread: bool, receive: Receive, send: Send) -> None:
    """Answer with an error; where the body is not read, the connection ends after it."""
    response = failure_of(refusal).response()
    headers = list(response.raw_headers)
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if unread:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": unread})
    if unread:
        await linger(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def check_headers(scope: Scope) -> None:
    """Raise ApiError where there are too many headers, or they and the path are too long."""
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers) + len(scope["query_string"]) + len(scope["path"])
    if len(headers) > MOST_HEADERS or size > MOST_HEADER_BYTES:
        raise ApiError(431, f"more than {MOST_HEADERS} headers or {MOST_HEADER_BYTES} bytes of them and the path")


class Hosts:
    """The names by which the server may be called.

    A web page can have its own name point to 127.0.0.1 and so talk to a server there, as if it were its own (DNS
    rebinding); the Host header tells. A server for other machines has names that it can't know: it takes any, unless
    some are configured.
    """

    def __init__(self, config: ServerConfig):
        self._names: set[str] | None = None
        if config.allowed_hosts or (config.uds is None and is_loopback(config.host)):
            own = f"[{config.host}]" if ":" in config.host else config.host
            self._names = {name.lower() for name in (*LOOPBACK, own, *config.allowed_hosts)}

    def check(self, scope: Scope) -> None:
        """Raise ApiError for a Host header that is missing, malformed or of a foreign name."""
        hosts = values(scope["headers"], b"host")
        if not hosts and self._names is None and scope.get("http_version") == "1.0":
            return
        match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None:
            raise ApiError(400, "the Host header is missing or malformed", None, "invalid_host")
        if self._names is not None and match[1].lower() not in self._names:
            raise ApiError(400, "the Host header names another server; see --allowed-hosts", None, "invalid_host")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Keys:
    """Who may come in. Keys are kept and compared as digests, always all of them, so that timing tells nothing."""

    def __init__(self, users: tuple[str, ...], admins: tuple[str, ...]):
        self._users, self._admins = [_digest(key) for key in users], [_digest(key) for key in admins]
        self._secret = os.urandom(16)

    def find(self, authorization: list[str]) -> tuple[str, bool] | None:
        """(short digest of the key, whether it is an admin's), ("", False) where no key is asked for, else None."""
        scheme, _, key = authorization[0].partition(" ") if len(authorization) == 1 else ("", "", "")
        given = _digest(key.strip(" ") if scheme.lower() == "bearer" else "")
        user = any([hmac.compare_digest(given, known) for known in self._users])  # noqa: C419 (all are compared)
        admin = any([hmac.compare_digest(given, known) for known in self._admins])  # noqa: C419
        if user or admin:
            return hashlib.blake2b(given, digest_size=8, key=self._secret).hexdigest(), admin
        return None if self._users else ("", False)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("latin-1")).digest()
