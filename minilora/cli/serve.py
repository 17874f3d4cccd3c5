"""`minilora serve`: its options, and the file and the environment that they may come from."""

import importlib.util
import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from ..errors import UsageError, did_you_mean
from ..params import vllm_hint
from ..server.settings import ServerConfig
from .opening import keeping
from .options import Size, engine_options, long_names, model_options, split_engine, split_lora
from .report import Reporter, announce_compiling


def _read_config(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Take the options of a file as defaults. Raises UsageError for one that does not exist."""
    if path is None:
        return
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--config {path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(content, Mapping):
        raise UsageError(f"--config {path}: it must hold names of options with their values")
    known = {name: option for option in context.command.params for name in long_names(option) if name != "config"}
    found: dict[str, Any] = {}
    for key, value in content.items():
        option = known.get(key.replace("_", "-"))
        if option is None:
            raise UsageError(f"--config {path}: there is no option {key!r}", vllm_hint(key) or did_you_mean(key, known))
        several = isinstance(option, click.Option) and option.multiple
        found[option.name or key] = [value] if several and not isinstance(value, list) else value
    context.default_map = found


def _option(name: str, help: str, kind: Any = None, **more: Any) -> Callable:
    """An option of ServerConfig: its default and, where `kind` does not say, its type are that field's."""
    default = getattr(ServerConfig, name.strip("-").replace("-", "_"))
    shown = default is not None and default != "" and not more.get("multiple")
    more = {"default": default, "show_default": shown, **({"type": kind} if kind else {}), **more}
    return click.option(name, help=help, **more)


class _Port(click.Option):
    """Kubernetes itself sets MINILORA_PORT=tcp://... for a Service called minilora: that is no port to listen on."""

    def resolve_envvar_value(self, ctx: click.Context) -> str | None:
        value = super().resolve_envvar_value(ctx)
        return None if value is not None and value.startswith("tcp://") else value


def _flag(name: str, help: str) -> Callable:
    default = getattr(ServerConfig, name.replace("-", "_"))
    return click.option(f"--{name}/--no-{name}", default=default, show_default=True, help=help)


def _several(name: str, field: str, help: str, **more: Any) -> Callable:
    return click.option(name, field, multiple=True, help=f"{help}; repeatable.", **more)


FILE = click.Path(path_type=Path)

SERVER_OPTIONS = (
    click.option(
        "--config",
        type=FILE,
        is_eager=True,
        expose_value=False,
        callback=_read_config,
        help="A TOML or JSON file with these options; the command line and MINILORA_* variables take precedence.",
    ),
    _option("--host", "Address to listen on."),
    _option("--port", "Port; 0 takes a free one.", click.IntRange(0, 65535), cls=_Port),
    _option("--uds", "A Unix socket to listen on instead.", metavar="PATH"),
    _option("--root-path", "Path prefix under which a proxy offers the server."),
    _option("--ssl-certfile", "Certificate (PEM), for TLS.", metavar="PATH"),
    _option("--ssl-keyfile", "Its private key (PEM).", metavar="PATH"),
    _several("--api-key", "api_keys", "Let in requests with this key"),
    click.option(
        "--api-key-file",
        type=FILE,
        help="A file with such keys, one per line; unlike --api-key, `ps` does not show them.",
    ),
    _several("--admin-key", "admin_keys", "A key that may also load and unload adapters"),
    click.option("--admin-key-file", type=FILE, help="A file with such keys."),
    _several(
        "--allowed-hosts",
        "allowed_hosts",
        "Another name for this server in the Host header; where other machines can reach it, the only ones accepted",
    ),
    _several("--allowed-origins", "allowed_origins", "Origin of web pages that may use the server"),
    _several("--served-model-name", "served_model_name", "Name of the base model; answers give the first"),
    _several("--lora", "loras", "An adapter to load at the start", metavar="NAME[=PATH[:SCALE]]"),
    _option("--lora-dir", "A folder of PEFT folders: each is an adapter, read on first use.", FILE),
    _flag("enable-runtime-lora", "Let requests with an admin key load adapters from --lora-dir."),
    _flag("isolate-cache-per-key", "Share no cached prefixes between API keys."),
    _option("--max-num-queued-reqs", "Texts that may wait, besides those that run.", int),
    _option("--max-queued-per-key", "Texts of one API key, waiting or running.", int),
    _option("--queue-timeout", "Seconds within which a request must start."),
    _option("--request-timeout", "Seconds within which it must be done."),
    _option("--shutdown-timeout", "Seconds that running requests get at shutdown."),
    _option("--keep-alive", "Seconds that an idle connection stays open."),
    _option("--header-timeout", "Seconds within which a request's headers must arrive."),
    _option("--body-timeout", "Seconds within which its body must arrive."),
    _option("--write-timeout", "Seconds that a client may leave an answer unread."),
    _option("--sse-ping-seconds", "Seconds between signs of life in a stream without news."),
    _option("--max-body-bytes", "Largest body of a request, such as 8M.", Size()),
    _option("--max-connections", "Connections at once.", int),
    _flag("enable-page", "Serve the page for browsers at /."),
    _flag("log-requests", "Log a line on stderr for each request."),
)


def server_options(function: Callable) -> Callable:
    """All options of the server itself."""
    for option in reversed(SERVER_OPTIONS):
        function = option(function)
    return function


@click.command()
@model_options
@server_options
@engine_options
def serve(model: str, dtype: str, group_size: str, threads: int | None, **rest: Any) -> int:
    """Serve a model and adapters over HTTP, with OpenAI's and vLLM's interfaces."""
    engine, options = split_engine(rest)
    loras = [split_lora(text) for text in options.pop("loras")]
    config = _config(options)
    _check_extra()
    with keeping():
        from ..server.run import Lora
        from ..server.run import serve as run

    reporter = Reporter()
    announce_compiling(reporter)

    def say(line: str) -> None:
        reporter.done()
        click.echo(line, err=True)

    engine |= {"dtype": dtype, "group_size": int(group_size), "threads": threads}
    return run(model, config, [Lora(*lora) for lora in loras], engine, say, reporter)


def _config(options: dict[str, Any]) -> ServerConfig:
    """The server's options, with the keys of files. Raises UsageError."""
    for field, file in (("api_keys", "api_key_file"), ("admin_keys", "admin_key_file")):
        path = options.pop(file)
        options[field] = (*options[field], *(_read_keys(path) if path is not None else ()))
    return ServerConfig(**options)


def _read_keys(path: Path) -> list[str]:
    """The keys in a file: its lines but for empty ones and those that begin with #."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read keys from {path}: {getattr(error, 'strerror', None) or error}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise UsageError(f"{path} holds no key", "Write each key on a line of its own.")
    return keys


def _check_extra() -> None:
    for module in ("fastapi", "uvicorn", "httptools", "prometheus_client"):
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"serving needs the package {module}", 'Install it: pip install "minilora[serve]"')
