"""The resident adapters: one byte arena of fixed size, slots with reference counts.

An adapter is one contiguous run of bytes. When free bytes are there but scattered, the arena is compacted; this
happens between steps only, when nothing reads it.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from minilora_kernels.pack import FLOAT16

from .adapters import Adapter, AdapterArrays, PackedAdapter, pack_adapter
from .config import ModelConfig
from .errors import ResourceError
from .weights import ALIGNMENT, aligned_empty


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
    """Holds up to `slots` adapters in `capacity` bytes, or as many as they take if that is None.

    fmt: FLOAT32 or FLOAT16, the form of their numbers.
    """

    def __init__(self, config: ModelConfig, slots: int, capacity: int | None, fmt: int = FLOAT16):
        self.config, self.format = config, fmt
        self.capacity, self._grows = capacity or 0, capacity is None
        layers = config.layers + 1
        self.arrays = AdapterArrays(
            aligned_empty(max(self.capacity, ALIGNMENT)),
            np.zeros((max(slots, 1), layers, 4, 2), np.int64),
            np.zeros((max(slots, 1), layers, 7, 3), np.int64),
            np.zeros((max(slots, 1), 3), np.int64),
        )
        self._slots: dict[str, Slot] = {}
        self._free_numbers = list(range(slots))[::-1]
        self._clock = 0

    @property
    def used(self) -> int:
        """Bytes that resident adapters take."""
        return sum(slot.size for slot in self._slots.values())

    def __contains__(self, digest: str) -> bool:
        return digest in self._slots

    def number(self, digest: str) -> int:
        """The slot's number of a resident adapter."""
        return self._slots[digest].number

    def acquire(self, digest: str) -> None:
        """Count one more user of a resident adapter."""
        slot = self._slots[digest]
        self._clock += 1
        slot.references, slot.last_used = slot.references + 1, self._clock

    def release(self, digest: str) -> None:
        """Count one user less."""
        slot = self._slots[digest]
        if slot.references == 0:
            raise AssertionError(f"adapter {digest[:8]} is released more often than acquired")
        slot.references -= 1

    def pack(self, adapter: Adapter) -> PackedAdapter:
        """The adapter's bytes in this pool's format; touches nothing of the pool, so any thread may call it."""
        return pack_adapter(adapter, self.config, self.format)

    def insert(self, digest: str, packed: PackedAdapter) -> bool:
        """Make an adapter resident, evicting unused ones, least recently used first; False where all are in use.

        Raises ResourceError where it could never fit.
        """
        if digest in self._slots:
            return True
        size = len(packed.data)
        if self._grows and self.used + size > self.capacity:
            self._grow(self.used + size)
        if size > self.capacity:
            raise ResourceError(
                f"an adapter of {size} bytes is larger than the whole pool of {self.capacity}",
                "Raise the adapter memory.",
            )
        while not self._free_numbers or self.used + size > self.capacity:
            if not self._evict():
                return False
        start = self._gap(size)
        slot = Slot(self._free_numbers.pop(), digest, start, size)
        self._slots[digest] = slot
        self.arrays.arena[start : start + size] = packed.data
        self._write_tables(slot, packed)
        return True

    def remove(self, digest: str) -> bool:
        """Forget an adapter that nobody uses; False where it is in use or not here."""
        slot = self._slots.get(digest)
        if slot is None or slot.references:
            return False
        del self._slots[digest]
        self._free_numbers.append(slot.number)
        self.arrays.inputs[slot.number] = self.arrays.outputs[slot.number] = 0
        self.arrays.embed[slot.number] = 0
        return True

    def _evict(self) -> bool:
        unused = [slot for slot in self._slots.values() if not slot.references]
        return bool(unused) and self.remove(min(unused, key=lambda slot: slot.last_used).digest)

    def _grow(self, capacity: int) -> None:
        arena = aligned_empty(capacity)
        arena[: self.capacity] = self.arrays.arena[: self.capacity]
        self.arrays, self.capacity = self.arrays._replace(arena=arena), capacity

    def _gap(self, size: int) -> int:
        """Where `size` bytes in a row are free, after moving adapters together if need be."""
        for _ in range(2):
            at = 0
            for slot in sorted(self._slots.values(), key=lambda slot: slot.start):
                if slot.start - at >= size:
                    return at
                at = slot.start + slot.size
            if self.capacity - at >= size:
                return at
            self._compact()
        raise AssertionError("the free bytes were counted wrong")

    def _compact(self) -> None:
        at = 0
        for slot in sorted(self._slots.values(), key=lambda slot: slot.start):
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
        slots = sorted(self._slots.values(), key=lambda slot: slot.start)
        for one, other in pairwise(slots):
            if one.start + one.size > other.start:
                raise AssertionError("two adapters overlap")
        numbers = [slot.number for slot in slots] + self._free_numbers
        if sorted(numbers) != list(range(len(numbers))):
            raise AssertionError("a slot is lost or used twice")
        if self.used > self.capacity or any(slot.references < 0 for slot in slots):
            raise AssertionError("more bytes than there are, or a negative count")
