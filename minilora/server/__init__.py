"""The engine behind HTTP: OpenAI's routes and vLLM's, with many adapters, for many users.

settings, run, start_page, shutdown    options; start; what is said then; signals and the end
app, state                          the application, and what its routes share
wire, guard, body, admission        what is let in: connections, requests, their bodies; how many requests at once
chat, completions, tokens, models, health, page    the routes
protocol, fields, sampling, names   requests: their fields, those that have no effect; parameters; adapters
generation, stream, logprobs        what both generation routes do; how answers are sent; log-probabilities
answers, failures                   the shapes of answers and of errors
metrics, dashboard                  what Prometheus and the page's dashboard read
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
