"""The waiting queue: priorities, then a fair share for every tenant, then arrival.

Each tenant has a counter of the tokens that it was given, divided by its weight. Of one priority, the tenant with
the lowest counter is next. One that comes back from idleness starts at the lowest counter of those at work, so that
nobody saves up a claim (virtual token counters: Sheng et al., OSDI 2024, arXiv:2401.00588).
"""

import heapq
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Iterator

from .sequence import Sequence

# What a generated token costs relative to one of a prompt.
GENERATED_COST = 2.0
# Counters of idle tenants that are kept without checking whether they still matter.
KEPT = 64

_Key = tuple[int, str]


def _order(sequence: Sequence) -> int:
    return sequence.number


class FairQueue:
    """Waiting sequences in the order in which they should start."""

    def __init__(self) -> None:
        self._lines: dict[_Key, list[Sequence]] = {}
        self._served: dict[str, float] = {}
        self._active: Counter[str] = Counter()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, in no special order."""
        return (sequence for line in self._lines.values() for sequence in line)

    def __contains__(self, sequence: Sequence) -> bool:
        line = self._lines.get((sequence.priority, sequence.tenant), [])
        place = bisect_left(line, sequence.number, key=_order)
        return place < len(line) and line[place] is sequence

    # ------------------------------------------------------------ tenants

    def enter(self, sequence: Sequence) -> None:
        """Count a new sequence of its tenant; called once for each sequence."""
        tenant = sequence.tenant
        if tenant not in self._active:
            self._served[tenant] = max(self._served.get(tenant, 0.0), self._floor())
        self._active[tenant] += 1

    def leave(self, sequence: Sequence) -> None:
        """A sequence is finished."""
        self._active[sequence.tenant] -= 1
        if not self._active[sequence.tenant]:
            del self._active[sequence.tenant]
            self._forget()

    def _forget(self) -> None:
        """Drop the counters of those who are idle and not ahead: when they come back they start at the floor anyway."""
        floor = self._floor() if self._active else float("inf")
        if not self._active or len(self._served) > 2 * len(self._active) + KEPT:
            self._served = {t: n for t, n in self._served.items() if t in self._active or n > floor}

    def _floor(self) -> float:
        return min((self._served[tenant] for tenant in self._active), default=0.0)

    def charge(self, sequence: Sequence, tokens: float) -> None:
        """Note that a sequence's tenant was given something."""
        self._served[sequence.tenant] += tokens / sequence.weight

    # ------------------------------------------------------------ waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, before those of the same tenant and priority that arrived later."""
        insort(self._lines.setdefault((sequence.priority, sequence.tenant), []), sequence, key=_order)
        self._size += 1

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of the queue. Raises KeyError where it is not in it."""
        if sequence not in self:
            raise KeyError(f"sequence {sequence.number} does not wait")
        key = (sequence.priority, sequence.tenant)
        del self._lines[key][bisect_left(self._lines[key], sequence.number, key=_order)]
        self._size -= 1
        if not self._lines[key]:
            del self._lines[key]

    def in_order(self, passed: Callable[[str], bool] = lambda tenant: False) -> Iterator[Sequence]:
        """The sequences, next one first. What is yielded may be removed and charged for before going on.

        passed: whether a tenant's further sequences are left out; asked before each of them.
        """
        heap = [
            (priority, self._served[tenant], line[0].number, tenant) for (priority, tenant), line in self._lines.items()
        ]
        heapq.heapify(heap)
        while heap:
            priority, served, number, tenant = heapq.heappop(heap)
            if passed(tenant):
                continue
            if served < self._served[tenant]:
                heapq.heappush(heap, (priority, self._served[tenant], number, tenant))
                continue
            line = self._lines[priority, tenant]
            yield line[bisect_left(line, number, key=_order)]
            later = bisect_right(line, number, key=_order)
            if later < len(line):
                heapq.heappush(heap, (priority, self._served[tenant], line[later].number, tenant))
