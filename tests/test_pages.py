"""The page pool under random operations, against a plain model of what it must do."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from minilora.cache import PagePool
from minilora_kernels.pages import RUN

PAGES = 6


class PoolMachine(RuleBasedStateMachine):
    """Tables of pages that come and go; what a key names is remembered and must be found as it was published."""

    def __init__(self):
        super().__init__()
        self.content = np.zeros(PAGES, np.int64)
        self.pool = PagePool(PAGES, on_free=self.free)
        self.tables = []
        self.writes = 0

    def free(self, page):
        assert not any(page in table for table in self.tables), "a page in use was freed"
        self.content[page] = -1

    def key(self, number):
        return b"key%d" % number

    @precondition(lambda self: self.pool.available)
    @rule()
    def take(self):
        page = self.pool.take()
        assert not any(page in table for table in self.tables)
        self.writes += 1
        self.content[page] = self.writes
        self.tables.append([page])

    @precondition(lambda self: self.tables)
    @rule(i=st.integers(0, 100), number=st.integers(0, 5))
    def publish(self, i, number):
        page = self.tables[i % len(self.tables)][0]
        known = self.pool.find([self.key(number)])
        if not known:
            self.content[page] = 1000 + number
            for other in range(6):
                # A page has one content: publishing it under a second key must not rename it.
                if other != number and self.pool.find([self.key(other)]) == [page]:
                    self.content[page] = 1000 + other
            self.pool.publish(page, self.key(number))

    @precondition(lambda self: self.tables)
    @rule(i=st.integers(0, 100))
    def unpublish(self, i):
        page = self.tables[i % len(self.tables)][0]
        self.pool.unpublish(page)
        self.content[page] = 0
        assert not any(self.pool.find([self.key(number)]) == [page] for number in range(6))

    @rule(numbers=st.lists(st.integers(0, 5), max_size=3, unique=True))
    def find_and_share(self, numbers):
        found = self.pool.find([self.key(number) for number in numbers])
        assert len(found) <= len(numbers)
        for page, number in zip(found, numbers, strict=False):
            assert self.content[page] == 1000 + number, "a key names another page's content"
            self.pool.share(page)
            self.tables.append([page])

    @precondition(lambda self: self.tables)
    @rule(i=st.integers(0, 100))
    def drop(self, i):
        [page] = self.tables.pop(i % len(self.tables))
        self.pool.drop(page)

    @rule()
    def forget(self):
        held = {page for table in self.tables for page in table}
        self.pool.forget_all()
        assert self.pool.cached == 0
        assert self.pool.held == len(held)

    @invariant()
    def books(self):
        self.pool.check_integrity(self.tables)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_the_oldest_idle_page_goes_first():
    pool = PagePool(2)
    first, second = pool.take(), pool.take()
    pool.publish(first, b"a")
    pool.publish(second, b"b")
    pool.drop(second)
    pool.drop(first)
    assert pool.take() == second
    assert pool.find([b"a"]) == [first]
    assert pool.find([b"b"]) == []
    assert pool.find([b"b", b"a"]) == [], "a prefix is found from its beginning or not at all"


def test_a_sequence_gets_neighbours_while_there_are_free_runs():
    pool = PagePool(5 * RUN - 1)
    first, second = [pool.take()], [pool.take()]
    for _ in range(2 * RUN - 1):
        first.append(pool.take(first[-1]))
        second.append(pool.take(second[-1]))
    assert [page % RUN for page in first] == [page % RUN for page in second] == list(range(RUN)) * 2
    for page in first[:RUN]:
        pool.drop(page)
    rest = [pool.take() for _ in range(pool.available)]
    assert sorted(rest + first[RUN:] + second) == list(range(5 * RUN - 1)), "in the end every page is handed out"


def test_memory_in_use_is_used_again():
    pool = PagePool(100 * RUN)
    for _ in range(50):
        pages = [pool.take()]
        for _ in range(RUN):
            pages.append(pool.take(pages[-1]))
        assert max(pages) < 2 * RUN
        for page in pages:
            pool.drop(page)


def test_misuse_is_noticed():
    pool = PagePool(1)
    page = pool.take()
    with pytest.raises(IndexError):
        pool.take()
    pool.drop(page)
    with pytest.raises(AssertionError, match="more often"):
        pool.drop(page)
