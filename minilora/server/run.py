"""Start, run and end: from options to a listening server, from a signal to an exit code."""

import uvicorn
from fastapi import FastAPI

from .settings import ServerConfig


def uvicorn_config(app: FastAPI, config: ServerConfig) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_level="info" if config.log_requests else "warning",
        access_log=config.log_requests,
        server_header=False,
        timeout_keep_alive=int(config.keep_alive),
        timeout_graceful_shutdown=5,
        limit_concurrency=config.max_connections,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
    )
