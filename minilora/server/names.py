"""Model names of requests and the adapters behind them.

A request names the base model, an adapter, base:adapter, or the base and a list of adapters with scales. Adapters are
registered by the command line, by the run-time routes, or found in `lora_dir` when a request first names them.
Whatever is unknown is an error: a wrong name never falls back to the base model.
"""

import asyncio
import logging
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from weakref import WeakValueDictionary

from ..async_engine import AsyncEngine
from ..checkpoint.resolve import entries
from ..errors import AdapterError, FormatError, NotFoundError, ResourceError, UnsupportedError, UsageError, did_you_mean
from ..outputs import LoRARequest
from ..peft import CONFIG, TENSORS
from .settings import ServerConfig

log = logging.getLogger("minilora.server")

LONGEST_NAME, LONGEST_PATH = 128, 1024
# Names that a wrong one is compared with, to say what may have been meant.
MOST_COMPARED = 500
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


def check_name(name: str, param: str) -> None:
    """Raise UsageError unless an adapter can have this name."""
    if not _is_name(name):
        raise UsageError(
            f"{param} must be 1 to {LONGEST_NAME} letters, digits, '.', '_' or '-', not beginning with '.' or '-'",
            param=param,
        )


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
        # Names that were unloaded, so that lora_dir does not bring them back.
        self._unloaded: set[str] = set()
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._listed: tuple[float, list[str]] = (0.0, [])

    # ------------------------------------------------------------ requests

    async def resolve(self, model: str | None, uses: Sequence[tuple[str, float]] = ()) -> Chosen:
        """What a request runs on. uses: names and scales of adapters beside the base model's name; without a model's
        name the base model is meant. Raises NotFoundError, and UsageError where both name adapters."""
        if len({name for name, _ in uses}) > (most := self._engine.config.max_loras):
            raise UsageError(f"a request may use {most} adapters at most", param="lora")
        if model is None or model in self.base:
            loras = [await self._use(name, scale) for name, scale in uses]
            return Chosen(model or self.base[0], tuple(loras))
        if uses:
            raise UsageError(f"with a list of adapters, model must be the base model, {self.base[0]!r}", param="model")
        base, _, adapter = model.rpartition(":")
        return Chosen(model, (await self._use(adapter if base in self.base else model, 1.0),))

    async def _use(self, name: str, scale: float) -> LoRARequest:
        known = self.known.get(name)
        if known is None or (known.signature and _signature(known.path) != known.signature):
            known = await self._discover(name)
        return LoRARequest(name, scale=scale * known.scale)

    async def _discover(self, name: str) -> Known:
        """Register an adapter of lora_dir, or register it again because its files were changed."""
        async with self._lock(name):
            path = await asyncio.to_thread(self._find, name)
            signature = _signature(path)
            known = self.known.get(name)
            if path is None or not signature or name in self._unloaded:
                if known is not None and known.signature:
                    # Its folder is gone.
                    del self.known[name]
                    await self._engine.remove_lora(name)
                raise await self._unknown(name)
            if known is None or known.signature != signature:
                await self._engine.add_lora(name, str(path), load=False)
                known = self.known[name] = Known(name, name, int(time.time()), path=path, signature=signature)
            return known

    def _find(self, name: str) -> Path | None:
        """The folder of an adapter in lora_dir, if it and all its files are there."""
        if self._folder is None or not _is_name(name):
            return None
        path = _inside(self._folder, name)
        return path if path != self._folder and _signature(path) else None

    async def _unknown(self, name: str) -> NotFoundError:
        """The error that names the nearest known name."""
        known = [other for other in (*self.base, *(await self.listed())) if other != name]
        hint = "" if len(name) > LONGEST_NAME else await asyncio.to_thread(did_you_mean, name, known[:MOST_COMPARED])
        return NotFoundError(f"no model or adapter is called {name[:LONGEST_NAME]!r}", hint)

    async def listed(self) -> list[str]:
        """The names of all adapters that requests may use, found in lora_dir or registered."""
        when, found = self._listed
        if time.monotonic() - when > 1.0:
            found = await asyncio.to_thread(self._scan)
            self._listed = (time.monotonic(), found)
            for name in [name for name, known in self.known.items() if known.signature and name not in found]:
                await self._forget(name)
        return [*self.known, *(name for name in found if name not in self.known and name not in self._unloaded)]

    async def _forget(self, name: str) -> None:
        """Drop what was found in lora_dir and is no longer there, unless another task is at work on that name."""
        lock = self._lock(name)
        if lock.locked():
            return
        async with lock:
            known = self.known.get(name)
            if known is not None and known.signature and not await asyncio.to_thread(self._find, name):
                del self.known[name]
                await self._engine.remove_lora(name)

    def _scan(self) -> list[str]:
        if self._folder is None:
            return []
        try:
            with os.scandir(self._folder) as folders:
                names = sorted(entry.name for entry in folders if _is_name(entry.name))
        except OSError as error:
            log.warning("lora_dir cannot be read, its adapters are not there: %s", error)
            return []
        return [name for name in names if self._find(name)]

    # ------------------------------------------------------------ loading and unloading

    async def register(self, name: str, source: str, scale: float = 1.0) -> Known:
        """Load an adapter that the operator named: a folder, a hub repo or a bundled one. Raises what loading does."""
        self._check_free(name, "lora")
        if not math.isfinite(scale):
            raise UsageError(f"the scale of adapter {name!r} must be a number, not {scale}")
        async with self._lock(name):
            await self._engine.add_lora(name, source)
            known = self.known[name] = Known(name, public_name(source), int(time.time()), scale)
            return known

    async def load(self, name: str, path: str, inplace: bool = False) -> Known:
        """Load an adapter from lora_dir at run time. inplace: it may replace one of that name.

        Raises UsageError for a wrong name or path, and what loading raises, without local folders in its text.
        """
        self._check_free(name, "lora_name")
        async with self._lock(name):
            if name in self.known and not inplace:
                raise UsageError(
                    f"an adapter called {name!r} exists already", "Set load_inplace to replace it.", "lora_name"
                )
            folder = await asyncio.to_thread(self._confined, path)
            try:
                await self._engine.add_lora(name, str(folder))
            except (AdapterError, FormatError, NotFoundError, UnsupportedError, ResourceError, UsageError) as error:
                cause = error.cause.replace(f"{folder}/", "").replace(str(folder), path)
                raise UsageError(cause, param="lora_path") from error
            self._unloaded.discard(name)
            known = self.known[name] = Known(name, str(folder.relative_to(self._folder or "")), int(time.time()))
            return known

    async def unload(self, name: str, force: bool = False) -> None:
        """Forget an adapter until it is loaded again; its requests finish first, or with force end with an error.

        Raises NotFoundError.
        """
        async with self._lock(name):
            in_folder = await asyncio.to_thread(self._find, name)
            if name not in self.known and (not in_folder or name in self._unloaded):
                raise await self._unknown(name)
            if self.known.pop(name, None):
                await self._engine.remove_lora(name, force)
            if in_folder:
                self._unloaded.add(name)

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    def _check_free(self, name: str, param: str) -> None:
        check_name(name, param)
        if name in self.base:
            raise UsageError(f"{name!r} is the base model's name", param=param)

    def _confined(self, path: str) -> Path:
        """The folder of an adapter, if it lies in lora_dir with all its files. Raises UsageError."""
        wrong = UsageError(
            "lora_path must be a folder with a PEFT adapter, inside the server's lora_dir", "", "lora_path"
        )
        if self._folder is None or not path or "\0" in path or len(path) > LONGEST_PATH:
            raise wrong
        folder = _inside(self._folder, path)
        if folder is None or not _signature(folder):
            raise wrong
        return folder


def _is_name(name: str) -> bool:
    return len(name) <= LONGEST_NAME and ".." not in name and bool(_NAME.fullmatch(name))


def _inside(root: Path, path: str) -> Path | None:
    """The folder of that path, if it and the files of an adapter lie in `root`, wherever links lead."""
    try:
        folder = (root / path).resolve()
        inside = all((folder / file).resolve().is_relative_to(root) for file in ("", *_FILES))
    except (OSError, RuntimeError):
        # Links in a circle are RuntimeErrors up to Python 3.12.
        return None
    return folder if inside else None


def _signature(folder: Path | None) -> Signature:
    """What changes when the files of an adapter do; empty where they are not all there."""
    try:
        found = [os.stat(folder / file) for file in _FILES] if folder else []
    except OSError:
        return ()
    return tuple((status.st_ino, status.st_size, status.st_mtime_ns) for status in found)
