"""The application: all routes, the guard around them, and errors in OpenAI's shape."""

import re
import uuid
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import __version__
from ..async_engine import AsyncEngine
from . import chat, completions, failures, health, models, page, tokens
from .guard import protect
from .settings import ServerConfig
from .state import Server


class _App(FastAPI):
    """FastAPI with the guard outermost: nothing of a request is looked at before the guard has let it in."""

    def build_middleware_stack(self) -> ASGIApp:
        server: Server = self.state.server
        app = _RequestId(super().build_middleware_stack())
        return protect(app, server.config, server.metrics.count, server.bodies)

    def openapi(self) -> dict[str, Any]:
        """The interface as a document, without the error that FastAPI announces for wrong fields: ours is a 400."""
        document = super().openapi()
        for methods in document["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        return document


class _RequestId:
    """Gives each request an id of our own, in scope["state"]["request_id"].

    The answer's X-Request-Id is the client's, if it sent a proper one, else ours: what a client chooses identifies
    nothing in here.
    """

    header = "x-request-id"
    proper = re.compile(r"[\x21-\x7e]{1,128}")

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request under its id."""
        own = scope.setdefault("state", {})["request_id"] = uuid.uuid4().hex
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == self.header.encode()]
        shown = given[0] if len(given) == 1 and self.proper.fullmatch(given[0]) else own

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[self.header] = shown
            await send(message)

        await self.app(scope, receive, sending)


def create_app(engine: AsyncEngine, config: ServerConfig) -> FastAPI:
    """The ASGI application that serves an engine. Its `state.server` is the Server."""
    # A redirect would lead from https to http, and take the client's key there: only the proxy knows the scheme.
    app = _App(title="minilora", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.server = Server(engine, config)
    failures.install(app)
    for routes in (chat, completions, tokens, models, health):
        app.include_router(routes.router)
    if config.enable_page:
        app.include_router(page.router)
    return app
