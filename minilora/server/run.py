"""Start and run: from options to a listening server, and to the exit code of its end."""

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn
from fastapi import FastAPI

from ..async_engine import AsyncEngine
from ..checkpoint.resolve import resolve_adapter
from ..errors import ResourceError, UsageError
from ..memory import give_back_freed_arrays
from ..peft import adapter_settings
from .app import create_app
from .guard import is_loopback, uvicorn_options
from .names import check_name
from .settings import ServerConfig
from .shutdown import Shutdown
from .start_page import start_page
from .state import Server
from .wire import BACKLOG, allow_connections, tls_context

Say = Callable[[str], None]


class Lora(NamedTuple):
    """An adapter to load at the start. source: a folder, a hub repo or a bundled one's name."""

    name: str
    source: str
    scale: float = 1.0


def serve(
    model: str, config: ServerConfig, loras: Sequence[Lora], options: Mapping[str, Any], say: Say, report: Say
) -> int:
    """Serve a model until a signal ends it; returns the exit code.

    options: AsyncEngine's; say: called with lines for the operator; report: with what takes long while loading.
    What can be wrong with options, files and the port is found before the model is loaded: raises UsageError,
    NotFoundError, ResourceError, and what loading raises.
    """
    logging.basicConfig(level=logging.INFO if config.log_requests else logging.WARNING)
    tls_context(config)
    allow_connections(config)
    for i, lora in enumerate(loras):
        check_name(lora.name, "lora")
        if lora.name in {other.name for other in loras[:i]}:
            raise UsageError(f"two adapters are called {lora.name!r}", "Give one of them another name.")
        adapter_settings(resolve_adapter(lora.source, report))
    give_back_freed_arrays()
    with bound(config) as listener:
        if not config.api_keys and config.uds is None and not is_loopback(config.host):
            say("warning: everybody who reaches this address may use the server; see --api-key-file")
        engine = AsyncEngine(model, report=report, **options)
        try:
            return asyncio.run(_serve(engine, config, loras, listener, say))
        finally:
            engine.close()


async def _serve(
    engine: AsyncEngine, config: ServerConfig, loras: Sequence[Lora], listener: socket.socket, say: Say
) -> int:
    app = create_app(engine, config)
    server: Server = app.state.server
    for lora in loras:
        await server.names.register(*lora)
    await engine.warm_up()
    # What is there now stays: looking through it for garbage would hold up all texts for a tenth of a second.
    gc.collect()
    gc.freeze()
    web = _Web(uvicorn_config(app, config))
    shutdown = Shutdown(web, server, say)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, shutdown.signal)
    watch = asyncio.ensure_future(shutdown.watch())
    listen(listener, config)
    say(await start_page(server, listener))
    await web.serve([listener])
    watch.cancel()
    return shutdown.exit_code


class _Web(uvicorn.Server):
    """uvicorn's server, which leaves signals to Shutdown."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Do nothing about them."""
        yield


def uvicorn_config(app: FastAPI, config: ServerConfig) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        app,
        **uvicorn_options(config, app.state.server.metrics.count),
        # Logging is set up by `serve`: all of it goes to stderr.
        log_config=None,
        access_log=config.log_requests,
        timeout_graceful_shutdown=5,
    )


# ---------------------------------------------------------------- the socket


@contextlib.contextmanager
def bound(config: ServerConfig) -> Iterator[socket.socket]:
    """The socket, with its address but not listening yet. Raises ResourceError where the address is taken."""
    if config.uds is not None:
        with _unix_socket(Path(config.uds)) as listener:
            yield listener
        return
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise UsageError(f"host {config.host!r} has no address") from None
    # asyncio sets TCP_NODELAY only where the socket says that it is TCP; without, each answer takes 40 ms longer.
    with socket.socket(family, kind, protocol or socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with _address_errors(config):
            listener.bind(address)
        yield listener


def listen(listener: socket.socket, config: ServerConfig) -> None:
    """Accept connections. Raises ResourceError."""
    with _address_errors(config):
        listener.listen(BACKLOG)


@contextlib.contextmanager
def _address_errors(config: ServerConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = config.uds or f"{config.host}:{config.port}"
        if error.errno == errno.EADDRINUSE:
            raise ResourceError(f"{where} is in use by another program", "Choose another --port.") from None
        raise ResourceError(f"cannot listen on {where}: {error.strerror or error}") from None


@contextlib.contextmanager
def _unix_socket(path: Path) -> Iterator[socket.socket]:
    """A Unix socket. One left by a server that has ended is replaced; the umask sets the file's mode."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.stat(path).st_mode) and not _answers(path):
                path.unlink()
        try:
            listener.bind(str(path))
        except OSError as error:
            raise ResourceError(f"cannot listen on {path}: {error.strerror or error}") from None
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0
