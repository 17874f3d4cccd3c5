"""The number of threads: fewer while others want the cores, all of them again afterwards."""

import pytest

from minilora.thread_count import LONGEST_WAIT, TOO_MUCH, WINDOW, ThreadCount


def work(count, seconds, free, step=0.004):
    """Steps for some seconds on a machine with `free` cores left; returns the sizes that they ran with."""
    sizes = []
    for _ in range(round(seconds / step)):
        sizes.append(count.size)
        count.observe(step, step * max(0.0, count.size - free))
    return sizes


def test_all_threads_work_while_nobody_else_does():
    assert set(work(ThreadCount(4), 5, free=4)) == {4}


def test_little_disturbances_are_borne():
    assert set(work(ThreadCount(4), 5, free=4 - TOO_MUCH / 2)) == {4}


def test_threads_that_cannot_run_are_left_out_at_once():
    sizes = work(ThreadCount(4), 0.3, free=2)
    assert sizes[-1] == 2
    assert sizes.index(2) * 0.004 <= 2 * WINDOW


def test_less_than_half_a_core_is_worth_a_thread():
    assert min(work(ThreadCount(4), 0.3, free=4 - 1.5 * TOO_MUCH)) == 3


def test_one_thread_always_remains():
    assert min(work(ThreadCount(2), 3, free=0.3)) == 1


def test_trying_more_costs_less_and_less():
    sizes = work(ThreadCount(4), 20, free=3)
    late = sizes[len(sizes) // 2 :]
    assert 0.9 < late.count(3) / len(late) < 1
    assert late.count(4) * 0.004 <= (10 / LONGEST_WAIT + 1) * 2 * WINDOW


@pytest.mark.parametrize("before", [1, 60])
def test_all_threads_return_when_the_others_have_gone(before):
    count = ThreadCount(4)
    work(count, before, free=1)
    sizes = work(count, 3 * LONGEST_WAIT + 1, free=4)
    assert sizes[-1] == 4


def test_long_steps_count_as_tries_too():
    count = ThreadCount(2)
    sizes = work(count, 40, free=1, step=0.5)
    assert sizes.count(2) < len(sizes) / 3
