"""What all routes share."""

import time
from typing import Annotated

from fastapi import Depends, Request

from ..async_engine import AsyncEngine
from .names import Names

try:
    from .admission import Gate
except ImportError:
    Gate = lambda *_: None
try:
    from .metrics import Metrics
except ImportError:
    Metrics = lambda *_: None
from .settings import ServerConfig


class Server:
    """A running server: its engine, its options, and the parts that keep books.

    started: when, in seconds since 1970. Handlers get it as a `ServerDep` parameter.
    """

    def __init__(self, engine: AsyncEngine, config: ServerConfig):
        self.engine, self.config = engine, config
        self.names = Names(engine, config)
        self.gate = Gate(config, engine)
        self.metrics = Metrics(engine, config)
        self.started = time.time()


async def _server(request: Request) -> Server:
    return request.app.state.server


ServerDep = Annotated[Server, Depends(_server)]
