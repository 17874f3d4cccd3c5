"""Which sequences run in the next step, and how many tokens of each. No arrays, no clock."""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from .cache import PagePool
from .sequence import Sequence, State


class Work(NamedTuple):
    """A sequence's share of a step: its next `length` tokens."""

    sequence: Sequence
    length: int


class Scheduler:
    """First come, first served, with chunked prefill: running texts first, new ones with what is left.

    page: tokens of a page; most_sequences: that run at once; budget: rows of a step; prompt_logits: rows of a step
    whose logits may be wanted beside the last one of each sequence; acquire, release: called when a sequence starts and stops holding its adapters;
    acquire says whether they are there. Raises nothing: what can't run now waits.
    """

    def __init__(
        self,
        pool: PagePool,
        page: int,
        most_sequences: int,
        budget: int,
        prompt_logits: int,
        acquire: Callable[[Sequence], bool],
        release: Callable[[Sequence], None],
        caching: bool = True,
    ):
        self.pool, self.page, self.caching = pool, page, caching
        self.most_sequences, self.budget, self.prompt_logits = most_sequences, budget, prompt_logits
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._acquire, self._release = acquire, release

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)

    def schedule(self) -> list[Work]:
        """The next step's work; the pages for it are taken. Empty only where nothing can run."""
        budget, plan = self.budget, []
        self._logits_left = self.prompt_logits
        for sequence in self._in_order():
            if budget == 0:
                break
            if sequence.state is State.RUNNING and (count := self._grant(sequence, budget)):
                plan.append(Work(sequence, count))
                budget -= count
        while budget and self.waiting and self._admit(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            if count := self._grant(sequence, budget):
                plan.append(Work(sequence, count))
                budget -= count
            elif sequence.state is not State.RUNNING:
                break
        return [work for work in plan if work.sequence.state is State.RUNNING]

    def _in_order(self) -> list[Sequence]:
        """Decodes before prefills, each in the order of arrival."""
        return sorted(self.running, key=lambda s: (s.pending > 1, s.number))

    def _grant(self, sequence: Sequence, budget: int) -> int:
        """How many tokens of a running sequence the step takes, with pages for them; 0 if it must pause or go."""
        count = min(sequence.pending, budget)
        if sequence.wants_prompt_logprobs:
            count = min(count, self._logits_left)
            self._logits_left -= count
        needed = -(-(sequence.computed + count) // self.page) - len(sequence.pages)
        while self.pool.available < needed:
            victim = self._victim(sequence)
            self.preempt(victim)
            if victim is sequence:
                return 0
        sequence.pages += [self.pool.take() for _ in range(needed)]
        return count

    def _victim(self, sequence: Sequence) -> Sequence:
        """Of the sequences that came later, the one whose loss costs least; else the sequence itself."""
        later = [other for other in self.running if other.number > sequence.number and other.pages]
        return min(later, key=lambda other: other.computed, default=sequence)

    def _admit(self, sequence: Sequence) -> bool:
        if len(self.running) + 1 + len(sequence.siblings) > self.most_sequences:
            return False
        found = self._cached_pages(sequence)
        first = min(sequence.pending - len(found) * self.page, self.page)
        idle = sum(1 for page in found if not self.pool.is_held(page))
        if self.pool.available - idle < -(-first // self.page) or not self._acquire(sequence):
            return False
        for page in found:
            self.pool.share(page)
        sequence.pages = list(found)
        sequence.computed = len(found) * self.page
        sequence.cached = max(sequence.cached, sequence.computed)
        sequence.state = State.RUNNING
        return True

    def _cached_pages(self, sequence: Sequence) -> list[int]:
        """Pages that already hold the text's beginning; at least one token is left to compute."""
        if not self.caching or sequence.wants_prompt_logprobs:
            return []
        keys = sequence.page_keys(self.page)[: (len(sequence.tokens) - 1) // self.page]
        return self.pool.find(keys)

    def computed(self, sequence: Sequence, count: int) -> None:
        """Note that a step computed `count` more tokens; full pages become known to others."""
        before, sequence.computed = sequence.computed, sequence.computed + count
        if self.caching:
            keys = sequence.page_keys(self.page)
            for i in range(before // self.page, sequence.computed // self.page):
                self.pool.publish(sequence.pages[i], keys[i])

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's pages; it will be computed again, before all that arrived later."""
        self._drop(sequence)
        sequence.state = State.WAITING
        sequence.preemptions += 1
        self.preemptions += 1
        later = next((i for i, other in enumerate(self.waiting) if other.number > sequence.number), len(self.waiting))
        self.waiting.insert(later, sequence)

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence in any state; its pages and adapters are free at once."""
        if sequence.state is State.RUNNING:
            self._drop(sequence)
        elif sequence.state is State.WAITING and sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.state, sequence.finish_reason = State.FINISHED, reason

    def start_copy(self, sequence: Sequence) -> None:
        """Make a sibling run: it already has its pages, or none and waits."""
        if sequence.pages:
            sequence.state = State.RUNNING
            self.running.append(sequence)
        else:
            self.waiting.appendleft(sequence)

    def _drop(self, sequence: Sequence) -> None:
        for page in sequence.pages:
            self.pool.drop(page)
        sequence.pages, sequence.computed = [], 0
        self.running.remove(sequence)
        self._release(sequence)

    def check_integrity(self) -> None:
        """Raise AssertionError where the books are wrong."""
        self.pool.check_integrity([sequence.pages for sequence in self.running])
        for sequence in self.running:
            if sequence.state is not State.RUNNING or len(sequence.pages) * self.page < sequence.computed:
                raise AssertionError(f"sequence {sequence.number} runs without pages")
        if any(sequence.pages or sequence.state is not State.WAITING for sequence in self.waiting):
            raise AssertionError("a waiting sequence holds pages")
