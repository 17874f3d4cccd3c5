"""Which sequences run in the next step, and how many tokens of each. No arrays, no clock.

Running texts come first: one token for each that decodes, then pieces of prompts with what is left of the budget.
New texts start in the waiting queue's order. One whose adapter is still being read is passed by. One that lacks
pages, or room for its adapters, is waited for, so that small requests can't starve a large one; while it is adapters
that are waited for, those that use none go on.
"""

from collections import Counter
from itertools import chain, islice
from typing import NamedTuple, Protocol

from .cache import PagePool
from .errors import MiniloraError
from .fairness import GENERATED_COST, FairQueue
from .registry import AHEAD
from .sequence import Sequence, State

# A step looks at LOOKED_AT * max_num_seqs texts that can't start now, and from then on at LOOKED_AT of each tenant.
LOOKED_AT = 4


class Work(NamedTuple):
    """A sequence's share of a step: its next `length` tokens."""

    sequence: Sequence
    length: int


class Adapters(Protocol):
    """What the scheduler asks of the adapters of sequences; AdapterRegistry answers."""

    def is_ready(self, versions: list, urgent: bool = True) -> bool:
        """Whether all are loaded; orders those that are not."""

    def acquire(self, versions: list) -> bool:
        """Hold them in the pool, if there is room."""

    def release(self, versions: list) -> None:
        """Stop holding them."""

    def enter(self, versions: list) -> None:
        """A sequence that uses them was submitted."""

    def leave(self, versions: list) -> None:
        """It is finished."""


class Scheduler:
    """Continuous batching with chunked prefill.

    page: tokens of a page; most_sequences: that run at once; budget: rows of a step; prompt_logits: rows of a step
    whose logits may be wanted beside the last one of each sequence. `chunk` bounds the prompt rows of a step in
    which texts decode. Raises nothing: what can't run now waits, what never can is in `failed`.
    """

    def __init__(
        self,
        pool: PagePool,
        adapters: Adapters,
        page: int,
        most_sequences: int,
        budget: int,
        prompt_logits: int,
        caching: bool = True,
    ):
        self.pool, self.adapters, self.page, self.caching = pool, adapters, page, caching
        self.most_sequences, self.budget, self.prompt_logits = most_sequences, budget, prompt_logits
        self.chunk = budget
        self.waiting = FairQueue()
        self.running: list[Sequence] = []
        self.failed: list[Sequence] = []
        self.preemptions = 0
        # Of the waiting, those that have run before; of these, those that lost their pages in this step.
        self._preempted: set[Sequence] = set()
        self._lost: set[Sequence] = set()
        self._step = self._grants = 0
        self._changed = False
        # Rows of logits that this step may still compute.
        self._logits_left = prompt_logits

    # ------------------------------------------------------------ requests

    def submit(self, sequences: list[Sequence]) -> None:
        """Queue the first of some new sequences; the others are its siblings."""
        for sequence in sequences:
            self.waiting.enter(sequence)
            self.adapters.enter(sequence.adapters)
        self._wait(sequences[0])

    def finish(self, sequence: Sequence, reason: str, error: Exception | None = None) -> None:
        """End a sequence in any state; its pages and adapters are free at once. Siblings that wait for it take over."""
        if sequence.state is State.FINISHED:
            return
        if sequence.state is State.RUNNING:
            self._stop(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        sequence.drop_drafts()
        self._preempted.discard(sequence)
        sequence.state, sequence.finish_reason, sequence.error = State.FINISHED, reason, error
        if sequence.holds_adapters:
            self.adapters.release(sequence.adapters)
            sequence.holds_adapters = False
        self.adapters.leave(sequence.adapters)
        self.waiting.leave(sequence)
        self._changed = True
        left = [sibling for sibling in sequence.siblings if sibling.state is State.WAITING]
        sequence.siblings = []
        if left:
            left[0].siblings = left[1:]
            self._wait(left[0])

    def _wait(self, sequence: Sequence) -> None:
        self.waiting.add(sequence)
        self._changed = True

    # ------------------------------------------------------------ one step

    def schedule(self) -> list[Work]:
        """The next step's work; the pages for it are taken. Empty only where nothing can run."""
        self._step += 1
        self._lost.clear()
        self._logits_left = self.prompt_logits
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        for sequence in self.running:
            (decodes if sequence.decodes else prefills).append(sequence)
        # A row is kept for prompts; if there is but one in all, the kinds take turns.
        prompts = bool(prefills) or (bool(self.waiting) and self._places_left > 0)
        keep = prompts and (self.budget > 1 or self._step % 2 == 0)
        plan = self._grant_all(sorted(decodes, key=_turn), self.budget - keep)
        room = self.budget - _rows(plan)
        if plan:
            room = min(room, self.chunk)
        first = self._grant_all(sorted(prefills, key=_rank), room)
        plan += first + self._admit_all(room - _rows(first))
        self._read_ahead()
        return [work for work in plan if work.sequence not in self._lost and work.sequence.state is State.RUNNING]

    @property
    def _places_left(self) -> int:
        """Sequences that may start, with room kept for siblings of those that run."""
        return self.most_sequences - sum(1 + len(sequence.siblings) for sequence in self.running)

    def _grant_all(self, sequences: list[Sequence], budget: int) -> list[Work]:
        plan = []
        for sequence in sequences:
            if budget <= 0:
                break
            if sequence.state is State.RUNNING and (count := self._grant(sequence, budget)):
                plan.append(Work(sequence, count))
                budget -= count
        return plan

    def _grant(self, sequence: Sequence, budget: int) -> int:
        """How many tokens of a running sequence the step takes, with pages for them; 0 if it must pause or go."""
        if sequence.drafted and not self._has_room_for_drafts(sequence, budget):
            sequence.drop_drafts()
        count = min(sequence.pending, budget)
        if sequence.wants_prompt_logprobs:
            count = min(count, self._logits_left)
            self._logits_left -= count
        self._logits_left -= sequence.drafted
        needed = self._missing(sequence, count)
        if needed > 0 and not self._take_pages(sequence, needed):
            return 0
        self._grants += 1
        sequence.served = self._grants
        return count

    def _has_room_for_drafts(self, sequence: Sequence, budget: int) -> bool:
        """Whether rows, logits and pages are left for them: nobody loses any for drafts."""
        pages = self._missing(sequence, sequence.pending) <= self.pool.available
        return pages and sequence.pending <= budget and sequence.drafted <= self._logits_left

    def _missing(self, sequence: Sequence, count: int) -> int:
        """Pages that it lacks for the next `count` tokens."""
        return -(-(sequence.computed + count) // self.page) - len(sequence.pages)

    def _take_pages(self, sequence: Sequence, count: int) -> bool:
        """Give it more pages, if need be those of others behind it; False if it had to give up its own."""
        while self.pool.available < count:
            victim = self._victim(sequence)
            self.preempt(victim)
            if victim is sequence:
                return False
        for _ in range(count):
            sequence.pages.append(self.pool.take(sequence.pages[-1] if sequence.pages else None))
        return True

    def take_ahead(self, sequences: list[Sequence], count: int) -> int:
        """Give planned sequences pages for `count` tokens each, or for fewer: nobody loses any for it.

        Returns for how many.
        """
        while count > 1:
            needed = [self._missing(sequence, count) for sequence in sequences]
            if sum(max(0, pages) for pages in needed) <= self.pool.available:
                for sequence, pages in zip(sequences, needed, strict=True):
                    sequence.pages += [self.pool.take(sequence.pages[-1]) for _ in range(pages)]
                return count
            count -= 1
        return 1

    def _victim(self, sequence: Sequence) -> Sequence:
        """Of the sequences behind this one, the one whose loss costs least; else the sequence itself."""
        behind = [other for other in self.running if _rank(other) > _rank(sequence) and other.pages]
        return min(behind, key=lambda other: other.computed, default=sequence)

    # ------------------------------------------------------------ starting

    def _admit_all(self, room: int) -> list[Work]:
        """Start waiting sequences while there are rows, places, pages and adapters for them."""
        plan: list[Work] = []
        places = self._places_left
        if room <= 0 or places <= 0 or not self.waiting:
            return plan
        full = adapters_full = False
        unread = 0
        stuck: Counter[str] = Counter()
        most = LOOKED_AT * self.most_sequences
        queue = self.waiting.in_order(lambda tenant: full or (stuck[tenant] >= LOOKED_AT and stuck.total() >= most))
        # Those that were preempted hold adapters that others may wait for: they are looked at wherever they stand.
        for sequence in chain(queue, sorted(self._preempted, key=_rank)):
            if room <= 0 or self._places_left <= 0:
                break
            if sequence.state is not State.WAITING or sequence in self._lost:
                continue
            # Behind one that waits for room only those may start that already hold some of it, or take none of it.
            if not sequence.holds_adapters and (full or (adapters_full and sequence.uses)):
                stuck[sequence.tenant] += 1
                continue
            try:
                if not self.adapters.is_ready(sequence.adapters, urgent=unread < places):
                    unread += 1
                elif (found := self._room_for(sequence)) is None:
                    full = True
                elif not self._hold_adapters(sequence):
                    adapters_full = True
                elif count := self._start(sequence, found, room):
                    plan.append(Work(sequence, count))
                    room -= count
                    continue
                stuck[sequence.tenant] += 1
            except MiniloraError as error:
                self.fail(sequence, error)
        return plan

    def _room_for(self, sequence: Sequence) -> list[int] | None:
        """The pages that already hold its beginning; None where places, or pages for the rest, are lacking."""
        if 1 + len(sequence.siblings) > self._places_left:
            return None
        found = self._cached_pages(sequence)
        needed = self._pages_for(sequence) - len(found)
        idle = sum(1 for page in found if not self.pool.is_held(page))
        promised = sum(self._pages_for(other) - len(other.pages) for other in self.running)
        enough = self.pool.available - idle >= needed + (promised if self.running else 0)
        return found if enough else None

    def _hold_adapters(self, sequence: Sequence) -> bool:
        if not sequence.holds_adapters:
            sequence.holds_adapters = self.adapters.acquire(sequence.adapters)
        return sequence.holds_adapters

    def _start(self, sequence: Sequence, found: list[int], room: int) -> int:
        """Let it run; returns how many of its tokens the step takes, of `room` at most."""
        self.waiting.remove(sequence)
        self._preempted.discard(sequence)
        for page in found:
            self.pool.share(page)
        sequence.pages = list(found)
        sequence.computed = len(found) * self.page
        sequence.cached = max(sequence.cached, sequence.computed)
        sequence.state = State.RUNNING
        self.pool.record(len(found), (len(sequence.tokens) - 1) // self.page)
        self.running.append(sequence)
        self.waiting.charge(sequence, max(0, len(sequence.tokens) - max(sequence.charged, sequence.computed)))
        sequence.charged = len(sequence.tokens)
        self._changed = True
        return self._grant(sequence, room)

    def _pages_for(self, sequence: Sequence) -> int:
        return -(-len(sequence.tokens) // self.page)

    def _cached_pages(self, sequence: Sequence) -> list[int]:
        """Pages that already hold the text's beginning; at least one token is left to compute."""
        if not self.caching or sequence.wants_prompt_logprobs:
            return []
        keys = sequence.page_keys(self.page)[: (len(sequence.tokens) - 1) // self.page]
        return self.pool.find(keys)

    def _read_ahead(self) -> None:
        """Order the adapters of those who start next."""
        if not self._changed:
            return
        self._changed = False
        for sequence in islice(self.waiting.in_order(), AHEAD):
            try:
                self.adapters.is_ready(sequence.adapters, urgent=False)
            except MiniloraError as error:
                self.fail(sequence, error)

    def fail(self, sequence: Sequence, error: Exception) -> None:
        """End a sequence for an error of its own, and its siblings that have not started."""
        waiting, sequence.siblings = sequence.siblings, []
        for one in (sequence, *waiting):
            if one.state is not State.FINISHED:
                self.finish(one, "error", error)
                self.failed.append(one)

    # ------------------------------------------------------------ after a step

    def computed(self, sequence: Sequence, count: int) -> None:
        """Note that a step computed `count` more tokens; full pages become known to others."""
        full = sequence.computed // self.page
        sequence.computed += count
        if self.caching and full < sequence.computed // self.page:
            keys = sequence.page_keys(self.page)
            for i in range(full, sequence.computed // self.page):
                self.pool.publish(sequence.pages[i], keys[i])

    def unpublish(self, sequence: Sequence) -> None:
        """Let nobody else find a sequence's pages: they may hold NaN."""
        for page in sequence.pages:
            self.pool.unpublish(page)

    def roll_back(self, sequence: Sequence) -> None:
        """Give back the pages that hold no computed token: drafts that proved wrong were there."""
        keep = -(-sequence.computed // self.page)
        for page in sequence.pages[keep:]:
            self.pool.drop(page)
        del sequence.pages[keep:]

    def generated(self, sequence: Sequence) -> None:
        """Note a new token."""
        self.waiting.charge(sequence, GENERATED_COST)
        sequence.charged = len(sequence.tokens)

    def preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's pages; it will be computed again. Its adapters stay with it."""
        self._stop(sequence)
        sequence.drop_drafts()
        sequence.state = State.WAITING
        sequence.preemptions += 1
        self.preemptions += 1
        self._preempted.add(sequence)
        self._lost.add(sequence)
        self._wait(sequence)

    def start_copy(self, sequence: Sequence) -> None:
        """Let a sibling run if it has pages already; without any, it waits."""
        if sequence.pages:
            sequence.state = State.RUNNING
            self.running.append(sequence)
        else:
            self._wait(sequence)

    def _stop(self, sequence: Sequence) -> None:
        # Its last pages are the first to go from the cache: they are of no use without those before.
        for page in reversed(sequence.pages):
            self.pool.drop(page)
        sequence.pages, sequence.computed = [], 0
        self.running.remove(sequence)

    def check_integrity(self) -> None:
        """Raise AssertionError where the books are wrong."""
        self.pool.check_integrity([sequence.pages for sequence in self.running])
        for sequence in self.running:
            if sequence.state is not State.RUNNING or len(sequence.pages) * self.page < sequence.computed:
                raise AssertionError(f"sequence {sequence.number} runs without pages")
            if not sequence.holds_adapters:
                raise AssertionError(f"sequence {sequence.number} runs without its adapters")
        if any(sequence.pages or sequence.state is not State.WAITING for sequence in self.waiting):
            raise AssertionError("a waiting sequence holds pages")
        if {sequence for sequence in self.waiting if sequence.holds_adapters} != self._preempted:
            raise AssertionError("a preempted sequence is forgotten")


def _rows(plan: list[Work]) -> int:
    return sum(work.length for work in plan)


def _turn(sequence: Sequence) -> tuple[int, int, int]:
    """The order in which texts that decode are served: in turn, whoever had a token longest ago comes first."""
    return sequence.served, sequence.priority, sequence.number


def _rank(sequence: Sequence) -> tuple[int, int]:
    """The smaller, the less likely to be preempted."""
    return sequence.priority, sequence.number
