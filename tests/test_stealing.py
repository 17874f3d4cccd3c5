"""Work that threads share: each item is done once, and nobody waits for one that is late."""

import numpy as np
import pytest

from minilora_kernels.atomics import atomic_add, atomic_load, pause
from minilora_kernels.jit import kernel
from minilora_kernels.stealing import MOST, begin_work, take
from minilora_kernels.sync import barrier
from minilora_kernels.team import Team, team_program


@kernel
def _do_all(thread, threads, sync, job, fixed):
    """done[turn, i] += 1 for all i < totals[turn]; every turn another thread is slow. pieces: how many each took."""
    (done, totals, pieces), (slowness, grain) = job, fixed
    for turn in range(len(totals)):
        begin_work(sync, thread)
        at, end = take(sync, thread, threads, totals[turn], grain)
        while at < end:
            pieces[turn, thread] += 1
            for i in range(at, end):
                done[turn, i] += 1
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
def _take_one(thread, threads, sync, ranges, total):
    begin_work(sync, thread)
    ranges[0], ranges[1] = take(sync, thread, threads, total, 1)


DO_ALL, LAST_IS_LATE, TAKE_ONE = (team_program(each) for each in (_do_all, _last_is_late, _take_one))


@pytest.fixture(params=[1, 2, 3, 5])
def team(request):
    team = Team(request.param)
    yield team
    team.close()


@pytest.mark.parametrize(("slowness", "grain"), [(0, 1), (1000, 1), (1000, 4)])
def test_every_item_is_done_once(team, slowness, grain):
    totals = np.array([0, 1, 4, 37, 1000, 1000, 0, 0, 3, 400] * 20)
    # Fewer threads leave others' parts behind as they were.
    for active in (team.size, 1, team.size):
        team.active = active
        done, pieces = np.zeros((len(totals), 1000), np.int64), np.zeros((len(totals), team.size), np.int64)
        team.run(DO_ALL, (done, totals, pieces), (slowness, grain))
        assert (done == (np.arange(1000) < totals[:, None])).all()


def test_more_ranges_than_they_have_numbers(team):
    """Nothing to do for so long that numbers begin again: then a part that was never written would look like one that is done."""
    totals = np.zeros(1 << 7, np.int64)
    totals[-1] = 4
    done, pieces = np.zeros((len(totals), 4), np.int64), np.zeros((len(totals), team.size), np.int64)
    team.run(DO_ALL, (done, totals, pieces), (0, 1))
    assert (done == (np.arange(4) < totals[:, None])).all()


@pytest.mark.parametrize("threads", [2, 3])
def test_others_do_what_a_late_thread_has_not_begun(threads):
    team = Team(threads)
    for total in (1, 2, 7, 100):
        done = np.zeros((threads, total), np.int64)
        team.run(LAST_IS_LATE, (done, np.zeros(1, np.int64)))
        assert (done.sum(0) == 1).all() and not done[-1].any()
    team.close()


def test_the_largest_range(team):
    ranges = np.zeros(2, np.int64)
    team.run(TAKE_ONE, ranges, MOST - 1, most=1)
    assert ranges[0] == 0 and 0 < ranges[1] < MOST


@pytest.mark.parametrize(("grain", "fewest", "most"), [(1, 10, 40), (50, 8, 20)])
def test_a_part_is_taken_in_pieces_that_get_shorter(grain, fewest, most):
    """Not one by one, so that there is little to do for it, nor as a whole, so that others can take the end of it."""
    team, pieces = Team(1), np.zeros((1, 1), np.int64)
    team.run(DO_ALL, (np.zeros((1, 1000), np.int64), np.array([1000]), pieces), (0, grain))
    assert fewest < pieces[0, 0] < most
    team.close()
