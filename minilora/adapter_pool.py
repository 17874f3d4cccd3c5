"""The resident adapters: one byte arena of fixed size, slots with reference counts.

An adapter is one contiguous run of bytes. When the free bytes are scattered, the arena is compacted, between steps
only, when nothing reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from minilora_kernels.formats import FLOAT16
from minilora_kernels.memory import CACHE_LINE, aligned_zeros

from .adapters import AdapterArrays, PackedAdapter
from .config import ModelConfig
from .errors import ResourceError


@dataclass
class Slot:
    """A place in the pool. references: sequences that use it now; last_used: number of the last use."""

    number: int
    digest: str
    start: int
    size: int
    references: int = 0
    last_used: int = 0


class AdapterPool:
    """Holds up to `slots` adapters in `capacity` bytes, of which `most_used` may be in use at once.

    fmt: FLOAT32, FLOAT16 or INT8, the form of their numbers. Memory that no adapter has used yet is not taken from the
    system. Raises ResourceError where the address space does not suffice.
    """

    def __init__(
        self, config: ModelConfig, slots: int, capacity: int, fmt: int = FLOAT16, most_used: int | None = None
    ):
        self.format, self.capacity, self.slots = fmt, capacity, slots
        self.most_used = slots if most_used is None else min(most_used, slots)
        self.hits = self.insertions = self.evictions = 0
        layers = config.layers + 1
        try:
            arena = aligned_zeros(max(capacity, CACHE_LINE))
        except MemoryError:
            raise ResourceError(f"no memory for {capacity} bytes of adapters", "Lower lora_memory.") from None
        self.arrays = AdapterArrays(
            fmt,
            arena,
            np.zeros((slots, layers, 4, 2), np.int64),
            np.zeros((slots, layers, 7, 3), np.int64),
            np.zeros((slots, 3), np.int64),
        )
        self._slots: dict[str, Slot] = {}
        self._free_numbers = list(range(slots))[::-1]
        self._clock = self._used = self._in_use = self._bytes_in_use = 0

    @property
    def used(self) -> int:
        """Bytes that resident adapters take."""
        return self._used

    @property
    def in_use(self) -> int:
        """Adapters that sequences hold."""
        return self._in_use

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, digest: str | None) -> bool:
        return digest in self._slots

    def number(self, digest: str) -> int:
        """The slot number of a resident adapter."""
        return self._slots[digest].number

    def can_use(self, sizes: Mapping[str, int]) -> bool:
        """Whether adapters of these digests and bytes may be in use at once, together with those that are."""
        fresh = [digest for digest in sizes if digest not in self._slots or not self._slots[digest].references]
        room = self.capacity - self._bytes_in_use - sum(sizes[digest] for digest in fresh)
        return room >= 0 and self._in_use + len(fresh) <= self.most_used

    def acquire(self, digest: str) -> None:
        """Count one more user of a resident adapter."""
        slot = self._slots[digest]
        if slot.references == 0:
            self._in_use += 1
            self._bytes_in_use += slot.size
        slot.references += 1
        self.touch(digest)

    def release(self, digest: str) -> None:
        """Count one user fewer."""
        slot = self._slots[digest]
        if slot.references == 0:
            raise AssertionError(f"adapter {digest[:8]} is released more often than acquired")
        slot.references -= 1
        if slot.references == 0:
            self._in_use -= 1
            self._bytes_in_use -= slot.size

    def touch(self, digest: str) -> None:
        """Note that a resident adapter is wanted: others are evicted before it."""
        self._clock += 1
        self._slots[digest].last_used = self._clock

    def check_size(self, size: int) -> None:
        """Raise ResourceError where an adapter of `size` bytes could never fit."""
        if size > self.capacity:
            raise ResourceError(
                f"an adapter of {size} bytes is larger than the whole pool of {self.capacity}", "Raise lora_memory."
            )

    def insert(self, digest: str, packed: PackedAdapter) -> bool:
        """Make an adapter resident, evicting unused ones, least recently used first.

        False where those in use leave no room. Raises ResourceError where it could never fit.
        """
        if digest in self._slots:
            return True
        size = len(packed.data)
        self.check_size(size)
        # Nothing is evicted in vain.
        if self._bytes_in_use + size > self.capacity or self._in_use == self.slots:
            return False
        while not self._free_numbers or self._used + size > self.capacity:
            self._evict()
        start = self._gap(size)
        slot = Slot(self._free_numbers.pop(), digest, start, size)
        self._slots[digest] = slot
        self._used += size
        self.insertions += 1
        self.arrays.arena[start : start + size] = packed.data
        self._write_tables(slot, packed)
        return True

    def remove(self, digest: str) -> bool:
        """Forget an adapter that nobody uses; False where it is in use or not here."""
        slot = self._slots.get(digest)
        if slot is None or slot.references:
            return False
        del self._slots[digest]
        self._used -= slot.size
        self._free_numbers.append(slot.number)
        self.arrays.inputs[slot.number] = self.arrays.outputs[slot.number] = 0
        self.arrays.embed[slot.number] = 0
        return True

    def _evict(self) -> None:
        unused = [slot for slot in self._slots.values() if not slot.references]
        self.evictions += 1
        self.remove(min(unused, key=lambda slot: slot.last_used).digest)

    def _gap(self, size: int) -> int:
        """Where `size` bytes in a row are free, after moving adapters together if need be."""
        for _ in range(2):
            at = 0
            for slot in self._in_place():
                if slot.start - at >= size:
                    return at
                at = slot.start + slot.size
            if self.capacity - at >= size:
                return at
            self._compact()
        raise AssertionError("the free bytes were counted wrong")

    def _in_place(self) -> list[Slot]:
        return sorted(self._slots.values(), key=lambda slot: slot.start)

    def _compact(self) -> None:
        at = 0
        for slot in self._in_place():
            if slot.start != at:
                self.arrays.arena[at : at + slot.size] = self.arrays.arena[slot.start : slot.start + slot.size].copy()
                self._shift(slot, at - slot.start)
                slot.start = at
            at += slot.size

    def _shift(self, slot: Slot, distance: int) -> None:
        n, a = slot.number, self.arrays
        a.inputs[n, ..., 0] += np.where(a.inputs[n, ..., 1] > 0, distance, 0)
        a.outputs[n, ..., 0] += np.where(a.outputs[n, ..., 1] > 0, distance, 0)
        if a.embed[n, 2]:
            a.embed[n, :2] += distance

    def _write_tables(self, slot: Slot, packed: PackedAdapter) -> None:
        n, a = slot.number, self.arrays
        a.inputs[n], a.outputs[n], a.embed[n] = packed.inputs, packed.outputs, packed.embed
        self._shift(slot, slot.start)

    def check_integrity(self) -> None:
        """Raise AssertionError where the books are wrong."""
        slots = self._in_place()
        for one, other in pairwise(slots):
            if one.start + one.size > other.start:
                raise AssertionError("two adapters overlap")
        if sorted([slot.number for slot in slots] + self._free_numbers) != list(range(self.slots)):
            raise AssertionError("a slot is lost or used twice")
        if self._used != sum(slot.size for slot in slots) or self._used > self.capacity:
            raise AssertionError("bytes are counted wrong")
        if any(slot.references < 0 for slot in slots):
            raise AssertionError("a negative count of users")
        if self._in_use != sum(slot.references > 0 for slot in slots) or self._in_use > self.most_used:
            raise AssertionError("adapters in use are counted wrong")
        if self._bytes_in_use != sum(slot.size for slot in slots if slot.references):
            raise AssertionError("bytes in use are counted wrong")

    def check_references(self, held: dict[str, int]) -> None:
        """Raise AssertionError where the counts of users are not these."""
        found = {slot.digest: slot.references for slot in self._slots.values() if slot.references}
        if found != held:
            raise AssertionError(f"adapters are held {held}, but {found} is counted")
