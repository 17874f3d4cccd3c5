"""What a server says of itself when it starts."""

import socket

from minilora_kernels.formats import FORMAT_NAMES

from .. import __version__
from .settings import ServerConfig
from .state import Server

MOST_NAMES = 8


async def start_page(server: Server, listener: socket.socket) -> str:
    """Model, format, room, adapters, address, and a command to try."""
    engine, names = server.engine, server.names
    weights = engine.model.weights
    formats = ", ".join(FORMAT_NAMES[fmt] for fmt in weights.formats)
    url = _url(server.config, listener)
    lines = [
        ("minilora", __version__),
        ("model", f"{names.base[0]}, {formats}, {len(weights.arena) / 1e6:.0f} MB"),
        ("KV cache", f"{engine.kv_tokens} tokens; a text has {server.longest} at most"),
        ("adapters", _adapters(await names.listed(), server.config)),
        ("address", url + _notes(server.config)),
        ("try", _curl(url, names.base[0], server.config)),
    ]
    return "\n".join(f"{name:9} {text}" for name, text in lines)


def _adapters(names: list[str], config: ServerConfig) -> str:
    shown = ", ".join(names[:MOST_NAMES]) or "none"
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return shown + more + ("" if config.lora_dir is None else f"; new ones are found in {config.lora_dir}")


def _url(config: ServerConfig, listener: socket.socket) -> str:
    if config.uds is not None:
        return f"unix:{config.uds}"
    # Port 0 has become a real one.
    port = listener.getsockname()[1]
    host = f"[{config.host}]" if ":" in config.host else config.host
    return f"{'https' if config.ssl_certfile else 'http'}://{host}:{port}"


def _notes(config: ServerConfig) -> str:
    page = ["with a page for browsers"] if config.enable_page else []
    prefix = [f"a proxy shows it under {config.root_path}"] if config.root_path else []
    return f" ({', '.join(page + prefix)})" if page or prefix else ""


def _curl(url: str, model: str, config: ServerConfig) -> str:
    socket_option = f"--unix-socket {config.uds} " if config.uds is not None else ""
    base = "http://localhost" if config.uds is not None else url
    key = "-H 'Authorization: Bearer KEY' " if config.api_keys else ""
    message = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    return f"curl {socket_option}{base}/v1/chat/completions -H 'Content-Type: application/json' {key}-d '{message}'"
