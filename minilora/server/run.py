"""Start, run and end: from options to a listening server, from a signal to an exit code."""

import uvicorn
from fastapi import FastAPI

from .guard import uvicorn_options
from .settings import ServerConfig


def uvicorn_config(app: FastAPI, config: ServerConfig) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        app,
        **uvicorn_options(config),
        log_level="info" if config.log_requests else "warning",
        access_log=config.log_requests,
        timeout_graceful_shutdown=5,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
    )
