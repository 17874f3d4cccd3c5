"""The server's own options. The engine's are params.EngineConfig."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UsageError

# Options in seconds that can't be 0.
TIMES = (
    *("queue_timeout", "request_timeout", "keep_alive", "sse_ping_seconds"),
    *("header_timeout", "body_timeout", "write_timeout"),
)

_ORIGIN = re.compile(r"\*|https?://[^/\s?#@]+")
_PREFIX = re.compile(r"(/[^/\s?#]+)*")


@dataclass(frozen=True)
class ServerConfig:
    """How the server listens, whom it lets in and what it holds back. Raises UsageError for what makes no sense.

    host, port: where it listens; port 0 takes a free one. uds: path of a Unix socket instead. ssl_certfile,
    ssl_keyfile: PEM files, for TLS. root_path: the prefix under which a proxy shows the server.

    api_keys: that let a request in, none for an open server; admin_keys: that also let adapters be loaded and
    unloaded. allowed_hosts: names in the Host header beside the ones that `host` implies, /health and /ready take
    any; allowed_origins: web pages of other origins that may use the server. served_model_name: names of the base
    model, the first in answers.

    lora_dir: the folder whose PEFT folders are found on first use; run-time loading, off without enable_runtime_lora,
    never leaves it. isolate_cache_per_key: API keys share no cached prefixes.

    max_num_queued_reqs: texts that wait, besides those that run, for all; max_queued_per_key: texts of one key, waiting
    or running. queue_timeout: seconds within which one of a request's prompts must start; request_timeout: within which
    it must be done; shutdown_timeout: for running requests when the server is told to end. keep_alive: of an idle
    connection; sse_ping_seconds: between two signs of life in a stream. header_timeout, body_timeout: within which a
    request's headers and its body must arrive; write_timeout: that a client may leave an answer unread. max_body_bytes,
    max_connections: what is refused above.

    enable_page: the page at /. log_requests: a line for each request on stderr.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    root_path: str = ""
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    served_model_name: tuple[str, ...] = ()
    lora_dir: Path | None = None
    enable_runtime_lora: bool = False
    isolate_cache_per_key: bool = False
    max_num_queued_reqs: int = 256
    max_queued_per_key: int | None = None
    queue_timeout: float = 60.0
    request_timeout: float = 600.0
    shutdown_timeout: float = 30.0
    keep_alive: float = 5.0
    sse_ping_seconds: float = 15.0
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    write_timeout: float = 60.0
    max_body_bytes: int = 8 << 20
    max_connections: int = 1024
    enable_page: bool = True
    log_requests: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise UsageError(f"port must be from 0 to 65535, not {self.port}")
        for name in TIMES:
            if not 0 < getattr(self, name) <= 86400:
                raise UsageError(f"{name} must be above 0 and at most 86400 seconds, not {getattr(self, name)}")
        if not 0 <= self.shutdown_timeout <= 86400:
            raise UsageError(f"shutdown_timeout must be from 0 to 86400 seconds, not {self.shutdown_timeout}")
        for name in ("max_num_queued_reqs", "max_queued_per_key", "max_body_bytes", "max_connections"):
            value, least = getattr(self, name), 0 if name == "max_num_queued_reqs" else 1
            if value is not None and value < least:
                raise UsageError(f"{name} must be {least} or more, not {value}")
        self._check_keys()
        self._check_names()
        if bool(self.ssl_certfile) != bool(self.ssl_keyfile):
            raise UsageError("TLS needs both ssl_certfile and ssl_keyfile")
        if self.lora_dir is not None and not self.lora_dir.is_dir():
            raise UsageError(f"lora_dir {str(self.lora_dir)!r} is not a folder")

    def _check_names(self) -> None:
        """What others know the server and its model by: what is malformed here would match nothing, ever."""
        if "" in self.served_model_name or len(set(self.served_model_name)) < len(self.served_model_name):
            raise UsageError("served_model_name must hold names that are not empty, each once")
        for origin in self.allowed_origins:
            if not _ORIGIN.fullmatch(origin):
                raise UsageError(f"allowed_origins must hold origins as https://host:port, or *, not {origin!r}")
        if not _PREFIX.fullmatch(self.root_path):
            raise UsageError(f"root_path must begin with a slash and not end with one, not {self.root_path!r}")

    def _check_keys(self) -> None:
        for key in (*self.api_keys, *self.admin_keys):
            if not key or not all("!" <= character <= "~" for character in key):
                raise UsageError("an API key must be printable ASCII without spaces, and not empty")
        if set(self.api_keys) & set(self.admin_keys):
            raise UsageError("a key is both an API key and an admin key", "Use different ones.")
        per_key = self.isolate_cache_per_key or self.max_queued_per_key is not None
        if per_key and not self.api_keys:
            raise UsageError(
                "isolate_cache_per_key and max_queued_per_key need API keys",
                "Give --api-key-file (or MINILORA_API_KEY).",
            )
        if self.enable_runtime_lora and (not self.admin_keys or self.lora_dir is None):
            raise UsageError(
                "loading adapters at run time needs an admin key and a folder that it is confined to",
                "Give --admin-key-file (or MINILORA_ADMIN_KEY) and --lora-dir.",
            )
