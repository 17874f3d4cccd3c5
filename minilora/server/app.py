"""The application: all routes, the guard around them, and errors in OpenAI's shape."""

from fastapi import FastAPI
from starlette.types import ASGIApp

from .. import __version__
from ..async_engine import AsyncEngine
from . import chat, completions, failures, models, tokens

# Until all authors have published (CORE removes this).
try:
    from . import health
except ImportError:
    health = None
try:
    from . import page
except ImportError:
    page = None
try:
    from .guard import protect
except ImportError:

    def protect(app, config):
        return app


from .settings import ServerConfig
from .state import Server


class _App(FastAPI):
    """FastAPI with the guard outermost: nothing of a request is looked at before the guard has let it in."""

    def build_middleware_stack(self) -> ASGIApp:
        return protect(super().build_middleware_stack(), self.state.server.config)


def create_app(engine: AsyncEngine, config: ServerConfig) -> FastAPI:
    """The ASGI application that serves an engine. Its `state.server` is the Server."""
    app = _App(title="minilora", version=__version__, root_path=config.root_path, docs_url=None, redoc_url=None)
    app.state.server = Server(engine, config)
    failures.install(app)
    for routes in (chat, completions, tokens, models, *([health] if health else [])):
        app.include_router(routes.router)
    if config.enable_page and page:
        app.include_router(page.router)
    return app
