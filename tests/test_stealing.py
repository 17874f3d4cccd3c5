"""Work that threads share: each item is done once, and nobody waits for one that is late."""

import numpy as np
import pytest

from minilora_kernels.atomics import atomic_add, atomic_load, pause
from minilora_kernels.jit import kernel
from minilora_kernels.stealing import MOST_ITEMS, NUMBERS, begin_work, take
from minilora_kernels.sync import barrier
from minilora_kernels.team import Team, team_program

from .support import Odd


@kernel
def _do_all(thread, threads, sync, job, fixed):
    """done[turn, thread, i] += 1 for all i < totals[turn], sizes[thread, i] = size of the piece; one thread is slow."""
    (done, totals, sizes), (slowness, grain) = job, fixed
    for turn in range(len(totals)):
        begin_work(sync, thread)
        at, end = take(sync, thread, threads, totals[turn], grain)
        while at < end:
            sizes[thread, at] = end - at
            for i in range(at, end):
                done[turn, thread, i] += 1
            for _ in range(slowness if turn % threads == thread else 0):
                pause()
            at, end = take(sync, thread, threads, totals[turn], grain)
        barrier(sync, threads)


@kernel
def _last_is_late(thread, threads, sync, job, fixed):
    """done[thread, i] += 1; the last thread begins when all others have nothing left to do."""
    done, ready = job
    while thread == threads - 1 and atomic_load(ready, 0) < threads - 1:
        pause()
    begin_work(sync, thread)
    at, end = take(sync, thread, threads, done.shape[1], 1)
    while at < end:
        for i in range(at, end):
            done[thread, i] += 1
        at, end = take(sync, thread, threads, done.shape[1], 1)
    atomic_add(ready, 0, 1)
    barrier(sync, threads)


@kernel
def _take_first(thread, threads, sync, found, total):
    begin_work(sync, thread)
    found[thread, 0], found[thread, 1] = take(sync, thread, threads, total, 1)


DO_ALL, LAST_IS_LATE, TAKE_FIRST = (team_program(each) for each in (_do_all, _last_is_late, _take_first))


@pytest.fixture(params=[1, 2, 3, 5])
def team(request):
    team = Team(request.param)
    yield team
    team.close()


def all_done(team, totals, slowness=0, grain=1):
    most = max(totals)
    done, sizes = np.zeros((len(totals), team.size, most), np.int64), np.zeros((team.size, most), np.int64)
    team.run(DO_ALL, (done, np.array(totals), sizes), (slowness, grain))
    return (done.sum(1) == (np.arange(most) < np.array(totals)[:, None])).all()


@pytest.mark.parametrize(("slowness", "grain"), [(0, 1), (1000, 1), (1000, 4)])
def test_every_item_is_done_once(team, slowness, grain):
    # Fewer threads leave others' parts behind as they were.
    for active in (team.size, 1, team.size):
        team.active = active
        assert all_done(team, [0, 1, 4, 37, 1000, 1000, 0, 0, 3, 400] * 20, slowness, grain)


def test_more_works_than_they_have_numbers(team):
    """Nothing to do for so long that numbers begin again: then a part that was never written would look like one that is done."""
    assert all_done(team, [0] * (NUMBERS - 1) + [4])


@pytest.mark.parametrize("threads", [2, 3])
def test_others_do_what_a_late_thread_has_not_begun(threads):
    team = Team(threads)
    for total in (1, 2, 7, 100):
        done = np.zeros((threads, total), np.int64)
        team.run(LAST_IS_LATE, (done, np.zeros(1, np.int64)))
        assert (done.sum(0) == 1).all() and not done[-1].any()
    team.close()


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_in_one_thread_ends_the_others(failing):
    """Barriers are open then: the others are in different works, and must not take one's parts for another's."""
    team, (done, sizes) = Team(3), (np.zeros((300, 3, 500), np.int64), np.zeros((3, 500), np.int64))

    def fail():
        raise ValueError("as planned")

    for totals in (np.full(300, 500), np.arange(300) % 50):
        with pytest.raises(ValueError, match="as planned"):
            team.run(Odd(failing, fail, DO_ALL), (done, totals, sizes), (100, 1))
        assert done.sum(1).max() <= 1, "nothing is done by two"
        done[:] = 0
    team.close()


def test_the_largest_work():
    team, found = Team(2), np.zeros((2, 2), np.int64)
    team.run(TAKE_FIRST, found, MOST_ITEMS - 1)
    assert found[0, 0] == 0 and found[1, 0] == (MOST_ITEMS - 1) // 2 and (found[:, 0] < found[:, 1]).all()
    team.close()


@pytest.mark.parametrize("grain", [1, 50])
def test_a_part_is_taken_in_pieces_that_get_shorter(grain):
    """Not one by one, so that there is little to do for it, nor as a whole, so that others can take the end of it."""
    team, sizes = Team(1), np.zeros((1, 1010), np.int64)
    team.run(DO_ALL, (np.zeros((1, 1, 1010), np.int64), np.array([1010]), sizes), (0, grain))
    *whole, last = sizes[sizes > 0]
    assert whole[0] in range(250, 301) and whole == sorted(whole, reverse=True) and len(whole) < 40
    assert all(size % grain == 0 for size in whole) and last <= grain
    team.close()
