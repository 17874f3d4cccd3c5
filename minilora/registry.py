"""Registered adapters: names, versions, and the disk tier behind the pool.

A name stands for one version at a time. A request keeps the version that it was submitted with; replacing a name
makes a new version. A version given as a folder is read and packed by a background thread when a request wants it,
enters the pool when that request starts, and leaves it when others need the room; one given as arrays keeps its
packed bytes in memory. From start to end of a request, preemptions included, its adapters stay in the pool.
"""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from .adapter_pool import AdapterPool
from .adapters import Adapter, PackedAdapter
from .errors import AdapterError, MiniloraError, NotFoundError, ResourceError, UsageError, did_you_mean
from .peft import adapter_settings

# Versions that are read ahead of the requests that may start now.
AHEAD = 4


@dataclass(eq=False)
class AdapterVersion:
    """One content of an adapter.

    path: its folder, None if it was given as arrays; digest, rank: None and 0 until it is loaded; packed: its bytes;
    with a folder, only while they wait to enter the pool; error: why it could not be loaded; users: requests that are
    not finished; retired: its name is gone or means another version; weight: share of the machine, relative to others.
    """

    name: str
    path: Path | None = None
    weight: float = 1.0
    digest: str | None = None
    rank: int = 0
    packed: PackedAdapter | None = None
    error: MiniloraError | None = None
    loading: bool = False
    retired: bool = False
    users: int = 0
    size: int = 0


@dataclass
class AdapterCounts:
    """loads: from disk, in load_seconds altogether, the slowest in longest_load; failures: that ended in an error;
    swap_seconds: spent on putting loaded ones into the pool."""

    loads: int = 0
    failures: int = 0
    load_seconds: float = 0.0
    longest_load: float = 0.0
    swap_seconds: float = 0.0


class Loaded(NamedTuple):
    """An adapter's content, and its bytes as the pool takes them."""

    adapter: Adapter
    packed: PackedAdapter


class _Result(NamedTuple):
    version: AdapterVersion
    loaded: Loaded | MiniloraError
    seconds: float


Read = Callable[[Path], Adapter]
Pack = Callable[[Adapter], PackedAdapter]


def _loaded(adapter: Adapter, pack: Pack) -> Loaded:
    return Loaded(adapter, pack(adapter))


class Loader:
    """A thread that reads adapters. read: run in it; wake: called in it when something is done, may be replaced."""

    def __init__(self, read: Callable[[Path], Loaded], wake: Callable[[], None]):
        self._read, self.wake = read, wake
        self._orders: SimpleQueue[AdapterVersion | None] = SimpleQueue()
        self.done: deque[_Result] = deque()
        self._thread: threading.Thread | None = None

    def order(self, version: AdapterVersion) -> None:
        """Read a version soon."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="minilora-loader", daemon=True)
            self._thread.start()
        self._orders.put(version)

    def _work(self) -> None:
        while (version := self._orders.get()) is not None:
            started = time.perf_counter()
            loaded = self._load(version)
            self.done.append(_Result(version, loaded, time.perf_counter() - started))
            self.wake()

    def _load(self, version: AdapterVersion) -> Loaded | MiniloraError:
        try:
            if version.path is None:
                raise AdapterError(f"adapter {version.name!r} has no folder to be read from")
            return self._read(version.path)
        except MiniloraError as error:
            return error
        except Exception as error:
            cause = AdapterError(f"adapter {version.name!r} could not be read from {version.path}: {error!r}")
            cause.__cause__ = error
            return cause

    def dismiss(self) -> None:
        """Let the thread end after what it is reading, without waiting for it."""
        self._orders.put(None)

    def close(self) -> None:
        """End the thread after what it is reading."""
        if self._thread is not None:
            self.dismiss()
            self._thread.join()
            self._thread = None


class AdapterRegistry:
    """Names of adapters and their way into the pool. All calls from one thread, the engine's.

    highest_rank: the highest that is accepted; read: reads an adapter from its folder; pack: makes its bytes for the
    pool; wake: called in the loader's thread when an adapter was read.
    """

    def __init__(self, pool: AdapterPool, highest_rank: int, read: Read, pack: Pack, wake: Callable[[], None]):
        self.pool, self.highest_rank = pool, highest_rank
        self.counts = AdapterCounts()
        self.names: dict[str, AdapterVersion] = {}
        self._read, self._pack = read, pack
        self.loader = Loader(lambda path: _loaded(read(path), pack), wake)
        weakref.finalize(self, self.loader.dismiss).atexit = False
        self._retired: set[AdapterVersion] = set()
        # Loads in the background; these and what was loaded and waits outside the pool.
        self._in_flight = self._outstanding = 0

    # ------------------------------------------------------------ names

    def read(self, source: Path | Adapter) -> Loaded:
        """An adapter's content, for `add`. May be called from any thread. Raises what reading raises."""
        return _loaded(self._read(source) if isinstance(source, Path) else source, self._pack)

    def add(
        self, name: str, source: Path | Adapter, weight: float = 1.0, loaded: Loaded | None = None
    ) -> AdapterVersion:
        """Let a name stand for this adapter from now on. Of a folder without `loaded` only the settings are read.

        Requests under way keep the version that they have. Raises NotFoundError, FormatError, UnsupportedError,
        AdapterError, UsageError or ResourceError, and then nothing has changed.
        """
        if not 0 < weight < float("inf"):
            raise UsageError(f"the weight of adapter {name!r} must be above 0, not {weight!r}")
        if isinstance(source, Path):
            rank = loaded.adapter.rank if loaded else adapter_settings(source)["r"]
        else:
            loaded = loaded or self.read(source)
            rank = loaded.adapter.rank
        self._check_rank(name, rank)
        if loaded:
            self.pool.check_size(len(loaded.packed.data))
        version = AdapterVersion(name, source if isinstance(source, Path) else None, weight)
        old, self.names[name] = self.names.get(name), version
        self._retire(old)
        if loaded:
            self._outstanding += version.path is not None
            self._fill(version, loaded)
            self._insert(version)
            self._drop_if_unused(version)
        return version

    def get(self, name: str) -> AdapterVersion:
        """The version that a name stands for. Raises NotFoundError."""
        if name not in self.names:
            raise NotFoundError(f"no adapter is called {name!r}", did_you_mean(name, self.names))
        return self.names[name]

    def remove(self, name: str) -> AdapterVersion:
        """Forget a name; its bytes go when the last request that uses it is finished. Raises NotFoundError."""
        version = self.get(name)
        del self.names[name]
        self._retire(version)
        return version

    def _check_rank(self, name: str, rank: int) -> None:
        if rank > self.highest_rank:
            raise UsageError(
                f"adapter {name!r} has rank {rank}, but max_lora_rank is {self.highest_rank}", "Raise max_lora_rank."
            )

    def _retire(self, version: AdapterVersion | None) -> None:
        if version is not None:
            version.retired = True
            self._retired.add(version)
            self._drop_if_unused(version)

    # ------------------------------------------------------------ requests

    def enter(self, versions: Iterable[AdapterVersion]) -> None:
        """A request was submitted."""
        for version in versions:
            version.users += 1

    def leave(self, versions: Iterable[AdapterVersion]) -> None:
        """A request is finished."""
        for version in versions:
            version.users -= 1
            if version.users == 0:
                # The next request may find the folder in order.
                version.error = None
                self._drop_if_unused(version)

    def is_ready(self, versions: Iterable[AdapterVersion], urgent: bool = True) -> bool:
        """Whether all are loaded; orders the rest. With urgent=False only while fewer than AHEAD are outstanding.

        Raises the error of one that can't be loaded.
        """
        ready = True
        for version in versions:
            if version.error is not None:
                raise version.error
            if version.digest in self.pool:
                self.pool.touch(version.digest or "")
            elif version.packed is None:
                ready = False
                if not version.loading and (urgent or self._outstanding < AHEAD):
                    version.loading = True
                    self._in_flight += 1
                    self._outstanding += 1
                    self.loader.order(version)
        return ready

    def acquire(self, versions: Iterable[AdapterVersion]) -> bool:
        """Put loaded adapters into the pool and hold them there; False, and nothing held, where there is no room.

        Raises ResourceError where they could never be there together.
        """
        found = list(versions)
        sizes = {version.digest or "": version.size for version in found}
        together = sum(sizes.values())
        if together > self.pool.capacity:
            raise ResourceError(
                f"the adapters of one request take {together} bytes, the pool has {self.pool.capacity}",
                "Raise lora_memory.",
            )
        if not self.pool.can_use(sizes):
            return False
        # Residents first, else room for one adapter could be made by evicting another of the same request.
        found.sort(key=lambda version: version.digest not in self.pool)
        self.pool.hits += sum(version.digest in self.pool for version in found)
        for version in found:
            self._insert(version)
            self.pool.acquire(version.digest or "")
        return True

    def release(self, versions: Iterable[AdapterVersion]) -> None:
        """Stop holding them."""
        for version in versions:
            self.pool.release(version.digest or "")

    def _insert(self, version: AdapterVersion) -> None:
        """Put a version into the pool, unless it is there, perhaps under another name, or there is no room."""
        if version.digest in self.pool:
            self._let_go(version)
            return
        if version.packed is None or version.digest is None:
            raise AssertionError(f"adapter {version.name!r} is not loaded")
        started = time.perf_counter()
        if self.pool.insert(version.digest, version.packed):
            self.counts.swap_seconds += time.perf_counter() - started
            self._let_go(version)

    # ------------------------------------------------------------ loading

    @property
    def loading(self) -> bool:
        """Whether the background thread has work or results."""
        return self._in_flight > 0

    def collect(self) -> None:
        """Take what the background thread has finished."""
        while self.loader.done:
            version, loaded, seconds = self.loader.done.popleft()
            version.loading = False
            self._in_flight -= 1
            counts = self.counts
            counts.loads += 1
            counts.load_seconds += seconds
            counts.longest_load = max(counts.longest_load, seconds)
            found = loaded if isinstance(loaded, MiniloraError) else self._objection(version, loaded) or loaded
            if isinstance(found, MiniloraError):
                counts.failures += 1
                # Where nobody waits for it any more, the next request reads it anew.
                version.error = found if version.users else None
                self._outstanding -= 1
            else:
                self._fill(version, found)
            self._drop_if_unused(version)

    def _objection(self, version: AdapterVersion, loaded: Loaded) -> MiniloraError | None:
        if version.digest is not None and loaded.packed.digest != version.digest:
            return AdapterError(
                f"the files of adapter {version.name!r} have changed since it was registered",
                "Register it again under the same name.",
            )
        try:
            self._check_rank(version.name, loaded.adapter.rank)
        except UsageError as error:
            return error
        return None

    def _fill(self, version: AdapterVersion, loaded: Loaded) -> None:
        version.digest, version.rank = loaded.packed.digest, loaded.adapter.rank
        version.packed, version.size = loaded.packed, len(loaded.packed.data)

    def _let_go(self, version: AdapterVersion) -> None:
        """Forget the bytes outside the pool of a version that can be read again."""
        if version.path is not None and version.packed is not None:
            version.packed = None
            self._outstanding -= 1

    def _drop_if_unused(self, version: AdapterVersion) -> None:
        if version.users or version.loading:
            return
        self._let_go(version)
        if version.retired:
            version.packed = None
            self._retired.discard(version)
            shared = any(other.digest == version.digest for other in (*self.names.values(), *self._retired))
            if version.digest is not None and not shared:
                self.pool.remove(version.digest)

    def close(self) -> None:
        """End the background thread."""
        self.loader.close()

    def check_integrity(self) -> None:
        """Raise AssertionError where the books are wrong."""
        self.pool.check_integrity()
        known = {*self.names.values(), *self._retired}
        outside = sum(version.loading or (version.path is not None and version.packed is not None) for version in known)
        if outside != self._outstanding:
            raise AssertionError(f"{outside} adapters are loading or loaded ahead, {self._outstanding} are counted")
        if any(version.users < 0 for version in known):
            raise AssertionError("a negative count of users")
        if any(version.retired and not version.users and not version.loading for version in self._retired):
            raise AssertionError("a retired adapter is kept without users")
