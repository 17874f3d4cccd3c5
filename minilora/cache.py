"""KV pages: the arrays that the step reads and writes, and who holds which page.

A page has a count of the sequences that hold it. With prefix caching a full page also has a key, the digest of
everything that its content depends on; once nobody holds it, it stays until its memory is needed, and the oldest
goes first.
"""

from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from minilora_kernels.pages import KV, KV_FLOAT16, KV_FLOAT32, KV_INT8, RUN, empty_pool, token_bytes

from .config import ModelConfig

KV_FORMATS = {"float32": KV_FLOAT32, "float16": KV_FLOAT16, "int8": KV_INT8}


def page_bytes(config: ModelConfig, kv_format: int, page: int) -> int:
    """Bytes that one page takes over all layers."""
    return 2 * config.layers * config.kv_heads * page * token_bytes(kv_format, config.head_dim)


def make_kv(config: ModelConfig, kv_format: int, pages: int, page: int) -> KV:
    """The arrays of a pool."""
    return empty_pool(kv_format, pages, config.layers, config.kv_heads, config.head_dim, page)


def _parts(kv: KV, page: int) -> list[np.ndarray]:
    """Views of one page's numbers in the pool's arrays, without scales where the format has none."""
    arrays = [(kv.numbers, kv.page * kv.size)] + ([(kv.scales, kv.page)] if len(kv.scales) > 1 else [])
    return [a.reshape(-1, kv.layers * kv.heads * 2, RUN, count)[page // RUN, :, page % RUN] for a, count in arrays]


def poison_page(kv: KV, page: int) -> None:
    """Fill a page with what no result may depend on: NaN, or with int8 numbers NaN as their scales."""
    for part in _parts(kv, page):
        part[:] = np.nan if part.dtype == np.float32 else 0x7E00 if part.dtype == np.uint16 else 127


def copy_page(kv: KV, source: int, target: int) -> None:
    """Copy one page of every layer."""
    for old, new in zip(_parts(kv, source), _parts(kv, target), strict=True):
        new[:] = old


class PagePool:
    """Hands out page numbers 0 .. pages - 1, to one sequence neighbouring ones as long as there are free runs of RUN.

    on_free: called with each page whose content is of no use any more. hits, lookups: pages that starting texts found,
    and looked for.
    """

    def __init__(self, pages: int, on_free: Callable[[int], None] | None = None):
        self.pages = pages
        self.hits = self.lookups = 0
        self._on_free = on_free
        # Last in, first out: memory that was in use is used again before more is taken from the system.
        self._free = dict.fromkeys(reversed(range(pages)))
        # Runs of which all pages are free.
        self._whole = dict.fromkeys(reversed(range(pages // RUN)))
        self._holders = [0] * pages
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that can be handed out now."""
        return len(self._free) + len(self._idle)

    @property
    def cached(self) -> int:
        """Pages that nobody holds and that are kept for texts that begin alike."""
        return len(self._idle)

    @property
    def held(self) -> int:
        """Pages that sequences hold."""
        return self.pages - self.available

    def take(self, before: int | None = None) -> int:
        """A page for one holder, next to page `before` if possible. Raises IndexError where none is available."""
        if self._free:
            page = self._choose(before)
            del self._free[page]
            self._whole.pop(page // RUN, None)
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
            self._freed(page)
        else:
            raise IndexError("no page is available")
        self._holders[page] = 1
        return page

    def _choose(self, before: int | None) -> int:
        if before is not None and (before + 1) % RUN and before + 1 in self._free:
            return before + 1
        return next(reversed(self._whole)) * RUN if self._whole else next(reversed(self._free))

    def _set_free(self, page: int) -> None:
        self._free[page] = None
        run = page // RUN * RUN
        if all(other in self._free for other in range(run, run + RUN)):
            self._whole[page // RUN] = None
        self._freed(page)

    def is_held(self, page: int) -> bool:
        """Whether any sequence holds the page."""
        return self._holders[page] > 0

    def share(self, page: int) -> None:
        """One holder more."""
        if self._holders[page] == 0:
            del self._idle[page]
        self._holders[page] += 1

    def drop(self, page: int) -> None:
        """One holder fewer; without holders, a page with a key idles and one without a key is free."""
        if self._holders[page] < 1:
            raise AssertionError(f"page {page} is dropped more often than held")
        self._holders[page] -= 1
        if self._holders[page] == 0:
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._set_free(page)

    def _freed(self, page: int) -> None:
        if self._on_free is not None:
            self._on_free(page)

    def record(self, hits: int, lookups: int) -> None:
        """Count what a starting text found in the cache."""
        self.hits += hits
        self.lookups += lookups

    def publish(self, page: int, key: bytes) -> None:
        """Say what a full page holds; if another page holds the same, that one stays known."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def unpublish(self, page: int) -> None:
        """Take back what was said of a page that is held: nobody else will find it."""
        if key := self._key_of.pop(page, None):
            del self._page_of[key]

    def find(self, keys: list[bytes]) -> list[int]:
        """Pages for the longest run of keys from the first on. They are not held yet."""
        found = []
        for key in keys:
            if (page := self._page_of.get(key)) is None:
                break
            found.append(page)
        return found

    def forget_all(self) -> None:
        """Drop every key: nothing computed so far is found again."""
        idle = list(self._idle)
        self._idle.clear()
        for page in idle:
            self._set_free(page)
        self._key_of.clear()
        self._page_of.clear()

    def check_integrity(self, tables: list[list[int]] | None = None) -> None:
        """Raise AssertionError where the books are wrong; tables: the pages that each sequence holds."""
        free, idle = set(self._free), set(self._idle)
        held = {page for page in range(self.pages) if self._holders[page]}
        if free & idle or free & held or idle & held:
            raise AssertionError("a page is in two states")
        whole = [run for run in range(self.pages // RUN) if free.issuperset(range(run * RUN, run * RUN + RUN))]
        if sorted(self._whole) != whole:
            raise AssertionError("free runs are counted wrong")
        if len(free) + len(idle) + len(held) != self.pages:
            raise AssertionError("a page is lost")
        if {page: key for key, page in self._page_of.items()} != self._key_of or free & self._key_of.keys():
            raise AssertionError("keys and pages differ")
        if not idle <= self._key_of.keys():
            raise AssertionError("an idle page has no key")
        if tables is not None:
            counts = [0] * self.pages
            for page in (page for table in tables for page in table):
                counts[page] += 1
            if counts != self._holders:
                raise AssertionError("holders are counted wrong")
