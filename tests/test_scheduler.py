"""Who runs when: fair shares, priorities, no starvation, preemption; and random operations on all of it."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minilora.cache import PagePool
from minilora.errors import AdapterError
from minilora.fairness import GENERATED_COST, KEPT
from minilora.pace import BURST, SMALLEST, Pace
from minilora.params import SamplingParams
from minilora.registry import AdapterVersion
from minilora.scheduler import Scheduler
from minilora.sequence import AdapterUse, Sequence, State

PAGE = 4


class Shelf:
    """Stands for the registry: adapters are there or not as the test says, and so many may be held at once."""

    def __init__(self, room=100):
        self.room, self.missing, self.broken = room, set(), set()
        self.held, self.users, self.orders = Counter(), Counter(), Counter()

    def is_ready(self, versions, urgent=True):
        if any(version in self.broken for version in versions):
            raise AdapterError("broken")
        if urgent:
            self.orders.update(version for version in versions if version in self.missing)
        return not any(version in self.missing for version in versions)

    def acquire(self, versions):
        if len(+self.held | Counter(versions)) > self.room:
            return False
        self.held.update(versions)
        return True

    def release(self, versions):
        self.held.subtract(versions)

    def enter(self, versions):
        self.users.update(versions)

    def leave(self, versions):
        self.users.subtract(versions)


class World:
    """A scheduler whose steps compute nothing."""

    def __init__(self, pages=64, running=4, budget=16, room=100, caching=True):
        self.pool, self.shelf = PagePool(pages), Shelf(room)
        self.scheduler = Scheduler(self.pool, self.shelf, PAGE, running, budget, 8, caching)
        self.number, self.finished, self.given = 0, [], Counter()
        self.versions = [AdapterVersion(f"a{i}", digest=f"{i:064x}") for i in range(5)]

    def submit(self, prompt=6, generate=4, adapter=None, priority=0, weight=1.0, tenant=None, first=None, n=1):
        sequences = []
        for _ in range(n):
            self.number += 1
            uses = () if adapter is None else (AdapterUse(self.versions[adapter], 1.0),)
            start = self.number * 1000 if first is None else first
            params = SamplingParams(max_tokens=generate)
            sequence = Sequence(self.number, list(range(start, start + prompt)), prompt, params, 0, uses)
            sequence.tenant = tenant or (uses[0].adapter.name if uses else "")
            sequence.priority, sequence.weight = priority, weight
            sequences.append(sequence)
        sequences[0].siblings = sequences[1:]
        self.scheduler.submit(sequences)
        return sequences[0]

    def step(self):
        plan = self.scheduler.schedule()
        assert sum(work.length for work in plan) <= self.scheduler.budget
        assert len(self.scheduler.running) <= self.scheduler.most_sequences
        assert len({work.sequence for work in plan}) == len(plan), "a sequence is planned twice"
        for work in plan:
            sequence = work.sequence
            self.scheduler.computed(sequence, work.length)
            if sequence.pending:
                continue
            siblings = [sibling for sibling in sequence.siblings if sibling.state is not State.FINISHED]
            sequence.siblings = []
            for sibling in siblings:
                self.scheduler.start_copy(sibling)
            for one in (sequence, *siblings):
                one.tokens.append(7)
                self.given[one.tenant] += 1
                self.scheduler.generated(one)
                if one.generated >= (one.params.max_tokens or 0):
                    self.scheduler.finish(one, "length")
                    self.finished.append(one)
        self.check()
        return plan

    def check(self):
        self.scheduler.check_integrity()
        held = Counter(
            v for s in (*self.scheduler.running, *self.scheduler.waiting) if s.holds_adapters for v in s.adapters
        )
        assert +self.shelf.held == held

    def run(self, patience=200):
        """Step until nothing is left; every so many steps at least one request must end."""
        since, count = 0, -1
        while self.scheduler.running or self.scheduler.waiting:
            self.step()
            ended = len(self.finished) + len(self.scheduler.failed)
            since, count = (0, ended) if ended != count else (since + 1, count)
            assert since < patience, "requests are left over"


# ---------------------------------------------------------------- shares


def test_a_flood_does_not_starve_others():
    world = World(running=2)
    flood = [world.submit(adapter=0) for _ in range(100)]
    for _ in range(10):
        world.step()
    late = world.submit(adapter=1)
    world.run()
    before = world.finished.index(late)
    assert before < 20, f"{before} of the flood's {len(flood)} requests went first"


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_shares_follow_weights(weight):
    world = World(running=4)
    for _ in range(200):
        world.submit(adapter=0)
        world.submit(adapter=1, weight=weight)
    for _ in range(150):
        world.step()
    assert world.given["a1"] / world.given["a0"] == pytest.approx(weight, rel=0.2)


@pytest.mark.parametrize("known", [False, True])
def test_idleness_is_no_credit(known):
    world = World(running=2)
    if known:
        world.submit(adapter=1)
    for _ in range(50):
        world.submit(adapter=0)
    for _ in range(60):
        world.step()
    for _ in range(50):
        world.submit(adapter=1)
    world.given.clear()
    for _ in range(60):
        world.step()
    assert world.given["a0"] >= 0.35 * sum(world.given.values())


def test_idleness_forgives_nothing():
    """Who was given more comes after who is new, however many others came and went meanwhile."""
    world = World(running=1, budget=64)
    world.shelf.missing = {world.versions[0]}
    world.submit(adapter=0)
    world.submit(prompt=60, generate=1, tenant="rich")
    for i in range(2 * KEPT):
        world.submit(prompt=1, generate=1, tenant=f"t{i}")
        world.step()
    again, new = world.submit(tenant="rich"), world.submit(tenant="new")
    world.shelf.missing.clear()
    world.run()
    assert world.finished.index(new) < world.finished.index(again)


def test_what_a_step_gives_a_tenant_counts_in_that_step():
    world = World(running=2)
    urgent, later = world.submit(tenant="a"), world.submit(tenant="a", priority=1)
    other = world.submit(tenant="b", priority=1)
    world.step()
    assert world.scheduler.running == [urgent, other] and later.state is State.WAITING


def test_tokens_are_paid_for_once():
    """Not again after a preemption, and not at all where pages hold them already."""
    world = World()
    served = world.scheduler.waiting._served
    text = world.submit(prompt=9, tenant="a", first=0)
    world.step()
    assert served["a"] == 9 + GENERATED_COST
    world.scheduler.preempt(text)
    world.pool.forget_all()
    world.step()
    assert text.generated == 2 and served["a"] == 9 + 2 * GENERATED_COST
    world.submit(prompt=9, tenant="b", first=0)
    before = served["b"]
    world.step()
    assert served["b"] == before + 1 + GENERATED_COST


def test_tenants_that_are_gone_are_forgotten():
    """One tenant is always at work; thousands of others come and go beside it."""
    world = World(running=4)
    for i in range(3000):
        if i % 5 == 0:
            world.submit(generate=30, tenant="steady")
        world.submit(tenant=f"t{i}")
        for _ in range(4):
            world.step()
    assert len(world.scheduler.waiting._served) < 300
    world.run()
    assert not world.scheduler.waiting._served


def test_within_a_tenant_arrival_counts():
    world = World(running=1)
    sequences = [world.submit(adapter=0) for _ in range(10)]
    world.run()
    assert world.finished == sequences


def test_priorities_go_first():
    world = World(running=1)
    world.submit(generate=20)
    world.step()
    slow = [world.submit(priority=1) for _ in range(3)]
    fast = [world.submit(priority=0) for _ in range(3)]
    urgent = world.submit(priority=-1)
    world.run()
    assert world.finished[1:] == [urgent, *fast, *slow]


def test_prompts_do_not_starve_texts_nor_texts_prompts():
    world = World(running=4, budget=16)
    text = world.submit(generate=60)
    world.step()
    world.scheduler.chunk = 8
    prompt = world.submit(prompt=100, generate=1)
    for _ in range(14):
        before = text.generated
        plan = world.step()
        assert text.generated == before + 1
        assert sum(work.length for work in plan) <= 9
    assert prompt.state is State.FINISHED


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_tiny_budgets_serve_everybody(budget):
    world = World(running=4, budget=budget)
    for i in range(6):
        world.submit(prompt=9, generate=5, adapter=i % 3)
    seen = Counter()
    for _ in range(12):
        seen.update(work.sequence.number for work in world.step())
    assert len(seen) >= 2, "with a row or two in a step, nobody keeps them all"
    world.run()
    assert len(world.finished) == 6


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_more_texts_than_rows_grow_in_turn(budget):
    world = World(budget=16)
    texts = [world.submit(prompt=2, generate=100) for _ in range(4)]
    world.step()
    world.scheduler.budget = budget
    before = [text.generated for text in texts]
    for _ in range(12):
        world.step()
    assert [text.generated for text in texts] == [count + 3 * budget for count in before]


@pytest.mark.parametrize(("budget", "drafts", "rows"), [(16, 5, [6, 1, 1]), (9, 4, [5, 1, 1])], ids=["logits", "rows"])
def test_drafts_share_the_rows_of_a_step_and_its_logits(budget, drafts, rows):
    world = World(budget=budget)
    texts = [world.submit(prompt=1) for _ in range(3)]
    world.step()
    for text in texts:
        text.tokens += [7] * drafts
        text.drafted = drafts
    assert [work.length for work in world.scheduler.schedule()] == rows


# ---------------------------------------------------------------- adapters that are not there


def test_a_request_whose_adapter_is_read_lets_others_pass():
    world = World()
    world.shelf.missing = {world.versions[0]}
    waiting, other = world.submit(adapter=0), world.submit(adapter=1)
    for _ in range(20):
        world.step()
    assert other.state is State.FINISHED
    assert waiting.state is State.WAITING and world.shelf.orders[world.versions[0]]
    world.shelf.missing.clear()
    world.run()


def test_a_long_queue_for_adapters_that_are_read_lets_others_pass():
    """Though its tenants were given less and so come first, however many they are."""
    world = World(running=2)
    world.shelf.missing = {world.versions[0], world.versions[1]}
    done = world.submit(generate=10)
    world.run()
    waiting = [world.submit(adapter=i % 2) for i in range(40)]
    others = [world.submit() for _ in range(3)]
    for _ in range(40):
        world.step()
    assert all(other.state is State.FINISHED for other in (done, *others))
    assert all(sequence.state is State.WAITING for sequence in waiting)
    world.shelf.missing.clear()
    world.run()


def test_those_of_one_tenant_pass_each_other_too():
    """As far as a step looks at all: the tenant's other requests do not wait for an adapter that is read."""
    world = World(running=2)
    world.shelf.missing = {world.versions[0]}
    waiting = [world.submit(adapter=0, tenant="key") for _ in range(7)]
    other = world.submit(adapter=1, tenant="key")
    for _ in range(10):
        world.step()
    assert other.state is State.FINISHED and all(sequence.state is State.WAITING for sequence in waiting)
    world.shelf.missing.clear()
    world.run()


def test_a_long_queue_for_adapters_room_lets_those_without_pass():
    world = World(room=1, running=2)
    world.submit(adapter=0, generate=60)
    world.step()
    for i in range(40):
        world.submit(adapter=1 + i % 2)
    other = world.submit(tenant="z")
    for _ in range(10):
        world.step()
    assert other.state is State.FINISHED
    world.run(400)


def test_adapters_are_urgent_for_as_many_as_may_start():
    world = World(running=2)
    world.shelf.missing = set(world.versions[:4])
    for i in range(4):
        world.submit(adapter=i)
    world.step()
    assert sum(world.shelf.orders.values()) == 2


def test_a_broken_adapter_is_told_to_those_who_wait():
    """Adapters are read ahead while all places are taken."""
    world = World(running=1)
    world.shelf.broken = {world.versions[0]}
    good = world.submit()
    world.step()
    bad = world.submit(adapter=0)
    world.step()
    assert good.state is State.RUNNING and isinstance(bad.error, AdapterError)
    world.run()


def test_a_broken_adapter_fails_its_requests_only():
    world = World()
    world.shelf.broken = {world.versions[0]}
    bad, good = world.submit(adapter=0, n=2), world.submit(adapter=1)
    world.run()
    assert bad.finish_reason == "error" and isinstance(bad.error, AdapterError)
    assert len(world.scheduler.failed) == 2 and good.finish_reason == "length"
    assert not +world.shelf.users


def test_nobody_passes_one_that_waits_for_room():
    world = World(room=1, running=4)
    first = world.submit(adapter=0, generate=30)
    world.step()
    blocked = world.submit(adapter=1)
    passing = [world.submit(adapter=0) for _ in range(5)]
    world.run()
    assert world.finished.index(blocked) == 1, "after the one that held the room"
    assert world.finished[0] is first and set(passing) <= set(world.finished)


def test_who_uses_no_adapter_does_not_wait_for_adapters():
    """Nor does the one that waits for them lose its turn, however many such come."""
    world = World(room=1, running=3)
    first = world.submit(adapter=0, generate=12)
    world.step()
    blocked, plain = world.submit(adapter=1), [world.submit(tenant=f"t{i}") for i in range(40)]
    world.step()
    assert plain[0] in world.scheduler.running and blocked in world.scheduler.waiting
    world.run()
    place = world.finished.index(blocked)
    assert world.finished.index(first) < place < len(world.finished) - 20


def test_who_lacks_pages_is_passed_by_nobody():
    world = World(pages=8, running=4, caching=False)
    world.submit(prompt=16, generate=8)
    world.step()
    blocked, small = world.submit(prompt=20), world.submit(prompt=4)
    world.step()
    assert blocked in world.scheduler.waiting and small in world.scheduler.waiting
    world.run()


# ---------------------------------------------------------------- pages


def test_preemption_takes_from_the_latest_and_loses_nothing():
    world = World(pages=8, running=4, caching=False)
    sequences = [world.submit(prompt=4, generate=16) for _ in range(4)]
    world.run()
    assert world.scheduler.preemptions > 0 and sequences[0].preemptions == 0
    assert all(len(sequence.tokens) == 20 for sequence in sequences)
    assert world.pool.held == 0


def test_preempted_with_too_few_slots_does_not_lock_up():
    """One of low priority holds the only slot while it is preempted; the other needs that slot."""
    world = World(pages=6, running=2, room=1, caching=False)
    low = world.submit(prompt=4, generate=16, adapter=0, priority=1)
    high = world.submit(prompt=4, generate=16, adapter=0)
    for _ in range(5):
        world.step()
    other = world.submit(prompt=4, generate=4, adapter=1)
    world.run()
    assert {low, high, other} == set(world.finished)


def test_preempted_behind_a_long_queue_does_not_lock_up():
    """What it holds is what all before it wait for; it must be found though a step looks at the queue's front only."""
    world = World(pages=12, running=3, room=1, caching=False)
    last = world.submit(prompt=4, generate=20, adapter=1, priority=1)
    world.step()
    queue = [world.submit(adapter=0) for _ in range(40)]
    world.scheduler.preempt(last)
    world.run()
    assert {last, *queue} == set(world.finished)


def test_siblings_keep_their_places():
    world = World(running=4)
    for _ in range(3):
        world.submit(prompt=40, n=3)
    world.run()
    assert len(world.finished) == 9


def test_pages_found_and_asked_for_are_counted():
    """Of a prompt of two pages the second one is computed in any case."""
    world = World()
    for hits, lookups in ((0, 1), (1, 2)):
        world.submit(prompt=2 * PAGE, first=0)
        world.run()
        assert (world.pool.hits, world.pool.lookups) == (hits, lookups)


def test_what_was_cached_at_first_is_remembered():
    world = World()
    world.submit(prompt=9, first=0)
    world.run()
    text = world.submit(prompt=9, first=0)
    world.step()
    world.scheduler.preempt(text)
    world.pool.forget_all()
    world.run()
    assert text.cached == 8


def test_pages_ahead_are_taken_as_far_as_they_are_free():
    world = World(pages=6)
    first, second = world.submit(prompt=6, generate=30), world.submit(prompt=6, generate=30)
    world.step()
    world.scheduler.schedule()
    assert world.scheduler.take_ahead([first, second], 100) == 6, "two of the six pages are free, one for each"
    assert [len(sequence.pages) for sequence in (first, second)] == [3, 3]
    assert world.scheduler.take_ahead([first, second], 3) == 3, "they have room already"
    assert world.scheduler.preemptions == 0 and world.pool.available == 0
    world.check()


# ---------------------------------------------------------------- random operations


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run, are cancelled, fail and lose their pages in any order; in the end all are finished."""

    def __init__(self):
        super().__init__()
        self.world = World(pages=12, running=3, budget=7, room=2)
        self.sequences = []

    @rule(
        prompt=st.integers(1, 20),
        generate=st.integers(1, 20),
        adapter=st.none() | st.integers(0, 3),
        priority=st.integers(0, 1),
        first=st.none() | st.just(0),
        n=st.integers(1, 3),
    )
    def submit(self, prompt, generate, adapter, priority, first, n):
        sequence = self.world.submit(prompt, generate, adapter, priority, first=first, n=n)
        self.sequences += [sequence, *sequence.siblings]

    @rule(count=st.integers(1, 4))
    def step(self, count):
        for _ in range(count):
            self.world.step()

    @precondition(lambda self: self.sequences)
    @rule(i=st.integers(0, 1000))
    def cancel(self, i):
        self.world.scheduler.finish(self.sequences[i % len(self.sequences)], "abort")

    @precondition(lambda self: self.sequences)
    @rule(i=st.integers(0, 1000))
    def fail(self, i):
        self.world.scheduler.fail(self.sequences[i % len(self.sequences)], ValueError("on purpose"))

    @precondition(lambda self: self.world.scheduler.running)
    @rule(i=st.integers(0, 1000))
    def preempt(self, i):
        running = self.world.scheduler.running
        self.world.scheduler.preempt(running[i % len(running)])

    @rule(i=st.integers(0, 3), there=st.booleans())
    def adapter_comes_or_goes(self, i, there):
        version = self.world.versions[i]
        if there:
            self.world.shelf.missing.discard(version)
        elif not self.world.shelf.held[version]:
            self.world.shelf.missing.add(version)

    @rule()
    def forget_prefixes(self):
        self.world.pool.forget_all()

    @invariant()
    def books(self):
        self.world.check()

    def teardown(self):
        self.world.shelf.missing.clear()
        self.world.run()
        assert all(sequence.state is State.FINISHED for sequence in self.sequences)
        assert self.world.pool.held == 0 and not +self.world.shelf.held and not +self.world.shelf.users


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=250, stateful_step_count=50, deadline=None)


# ---------------------------------------------------------------- pace


def test_pace_learns_how_long_rows_take():
    pace = Pace(0.1, 512, 8)
    assert pace.chunk() == 512, "nothing is known yet"
    pace.observe(4, 0, 0.02)
    pace.observe(0, 100, 0.1)
    assert pace.chunk() == 80, "the first steps count in full"
    for _ in range(50):
        pace.observe(4, 0, 0.004)
        pace.observe(4, 100, 0.004 + 0.05)
    assert pace.chunk() == pytest.approx(0.096 / 0.0005, abs=2)
    for _ in range(100):
        pace.observe(4, 100, 0.004 + 5.0)
    assert pace.chunk() == SMALLEST, "prompts always go on"
    assert Pace(None, 512, 8).chunk() == 512


def test_pace_says_how_many_tokens_fit_in_a_burst():
    pace = Pace(None, 512, 8)
    assert pace.rounds() == 1, "nothing is known yet"
    pace.observe(8, 0, BURST / 3.5)
    assert pace.rounds() == 3
    pace.limit = BURST / 2
    assert pace.rounds() == 1, "a step's limit holds too"
    pace = Pace(None, 512, 8)
    for seconds, rounds in ((1.0, 1), (BURST / 100, 8), (BURST / 2.5, 2)):
        pace.observe(1, 0, seconds)
        assert pace.rounds() == rounds
