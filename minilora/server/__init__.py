"""The engine behind HTTP: OpenAI's routes and vLLM's, with many adapters, for many users.

settings, run          options; start, signals, end
app, state             the application, and what its routes share
guard, admission       who and what is let in; how many at once
chat, completions, tokens, models, health, page    the routes
protocol, sampling, names, stream, failures        requests and answers, in and out
metrics                what Prometheus reads
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import create_app as create_app
    from .run import serve as serve
    from .settings import ServerConfig as ServerConfig

# Loaded on first use: options can be read without FastAPI.
_WHERE = {"create_app": "app", "serve": "run", "ServerConfig": "settings"}

__all__ = ["ServerConfig", "create_app", "serve"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f".{_WHERE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
