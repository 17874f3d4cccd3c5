"""Model names of requests and the adapters behind them.

A request names the base model, an adapter, base:adapter, or the base and a list of adapters with scales. Adapters are
registered by the command line, by the run-time routes, or found in `lora_dir` when a request first names them.
Whatever is unknown is an error: a wrong name never falls back to the base model.
"""

import asyncio
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..adapters import CONFIG, TENSORS
from ..async_engine import AsyncEngine
from ..checkpoint.lock import entries
from ..errors import NotFoundError, UsageError, did_you_mean
from ..outputs import LoRARequest
from .settings import ServerConfig

LONGEST_NAME = 128
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
# Files of an adapter that tell whether it was changed.
_FILES = (CONFIG, TENSORS)

Signature = tuple[tuple[int, int, int], ...]


class Chosen(NamedTuple):
    """What a request runs on. name: for its answer, as the request gave it; loras: in the order of application."""

    name: str
    loras: tuple[LoRARequest, ...]


@dataclass
class Known:
    """A registered adapter. root: what it was made from, without local folders; path: its folder, where it was
    found in lora_dir, and signature: of its files then; scale: factor on every use."""

    name: str
    root: str
    created: int
    scale: float = 1.0
    path: Path | None = None
    signature: Signature = field(default=())


def check_name(name: str, param: str = "lora_name") -> str:
    """The name of an adapter, if it can be one. Raises UsageError."""
    if len(name) > LONGEST_NAME or not _NAME.fullmatch(name) or ".." in name:
        raise UsageError(
            f"{param} must be 1 to {LONGEST_NAME} letters, digits, '.', '_' or '-', not beginning with '.' or '-'",
            param=param,
        )
    return name


def public_name(source: str) -> str:
    """What a model or adapter may be called in public: a path without its folders, any other name as it is."""
    return source if source in entries("models") or not Path(source).exists() else Path(source).resolve().name


class Names:
    """All names that requests may use. Coroutines of one event loop may call all methods at the same time."""

    def __init__(self, engine: AsyncEngine, config: ServerConfig):
        self._engine = engine
        self._folder = None if config.lora_dir is None else config.lora_dir.resolve()
        self.root = public_name(engine.model.name)
        self.base = config.served_model_name or (self.root,)
        self.known: dict[str, Known] = {}
        self._lock = asyncio.Lock()
