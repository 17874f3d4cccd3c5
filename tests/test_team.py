"""The team: everybody meets, work is split once, and trouble in one thread holds nobody up."""

import os
import signal
import threading
import time

import numpy as np
import pytest

from minilora_kernels.jit import kernel
from minilora_kernels.sync import arrive, barrier, claim, share, wait
from minilora_kernels.team import Each, Team, team_program

from .support import Odd, interrupts_at


@kernel
def _rounds(thread, threads, sync, job, fixed):
    """marks[round, thread] = 1; late counts threads that were let through a barrier too early."""
    marks, late = job
    for i in range(len(marks)):
        marks[i, thread] = 1
        barrier(sync, threads)
        for other in range(threads):
            late[thread] += 1 - marks[i, other]
        barrier(sync, threads)


@kernel
def _halves(thread, threads, sync, job, fixed):
    """As _rounds, with barriers in halves, and whole ones between."""
    marks, late = job
    for i in range(len(marks)):
        marks[i, thread] = 1
        arrive(sync, thread)
        wait(sync, thread, threads)
        for other in range(threads):
            late[thread] += 1 - marks[i, other]
        if i % 3 == 0:
            barrier(sync, threads)


@kernel
def _claims(thread, threads, sync, taken, fixed):
    for turn in range(len(taken)):
        i = claim(sync)
        while i < taken.shape[1]:
            taken[turn, i] += 1
            i = claim(sync)
        barrier(sync, threads)


@kernel
def _shares(thread, threads, sync, taken, fixed):
    first, end = share(len(taken), thread, threads)
    for i in range(first, end):
        taken[i] += 1


@kernel
def _own(thread, threads, sync, shared, number):
    shared[thread] = number


@kernel
def _who_ran(thread, threads, sync, ran, fixed):
    ran[thread] = threads


ROUNDS, HALVES, CLAIMS, SHARES = (team_program(each) for each in (_rounds, _halves, _claims, _shares))
OWN, WHO_RAN = team_program(_own), team_program(_who_ran)


def meets(team):
    marks, late = np.zeros((200, team.size), np.int64), np.zeros(team.size, np.int64)
    team.run(ROUNDS, (marks, late))
    return marks.all() and not late.any()


@pytest.fixture(params=[1, 2, 3, 5])
def team(request):
    team = Team(request.param)
    yield team
    team.close()


@pytest.fixture
def pair():
    team = Team(2)
    yield team
    team.close()


def test_a_closed_team_runs_nothing():
    team = Team(2)
    assert meets(team)
    team.close()
    with pytest.raises(RuntimeError, match="closed"):
        meets(team)


def test_nobody_passes_a_barrier_early(team):
    assert meets(team)


def test_nobody_passes_the_second_half_of_a_barrier_early(team):
    for _ in range(3):
        marks, late = np.zeros((2000, team.size), np.int64), np.zeros(team.size, np.int64)
        team.run(HALVES, (marks, late))
        assert marks.all() and not late.any()


def test_each_piece_is_claimed_once(team):
    taken = np.zeros((50, 37), np.int64)
    team.run(CLAIMS, taken)
    assert (taken == 1).all()


@pytest.mark.parametrize("total", [0, 1, 4, 37])
def test_shares_cover_everything_once(team, total):
    taken = np.zeros(total, np.int64)
    team.run(SHARES, taken)
    assert (taken == 1).all()


@pytest.mark.parametrize("program", [ROUNDS, HALVES], ids=["barrier", "halves"])
@pytest.mark.parametrize("thread", [0, 1])
def test_an_error_in_one_thread_frees_the_others(pair, thread, program):
    def fail():
        raise ZeroDivisionError("on purpose")

    for _ in range(3):
        with pytest.raises(ZeroDivisionError, match="on purpose"):
            pair.run(Odd(thread, fail, program), (np.zeros((200, 2), np.int64), np.zeros(2, np.int64)))
        assert meets(pair), "the team still works"


def test_an_interrupt_waits_for_the_threads_inside(pair):
    inside = threading.Event()

    def slow():
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        inside.set()
        time.sleep(0.3)
        inside.clear()
        pair.abort()

    with pytest.raises(KeyboardInterrupt):
        pair.run(Odd(1, slow, ROUNDS), (np.zeros((200, 2), np.int64), np.zeros(2, np.int64)))
    assert not inside.is_set(), "nobody is left in the team's arrays"
    assert meets(pair)


@pytest.fixture
def alarm_interrupts():
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timer that interrupts here")
def test_interrupts_at_any_moment(pair, alarm_interrupts):
    """Ctrl-C comes before, in and after a run: it is raised, and what the next run does is right."""
    interrupts = 0
    for i in range(150):
        try:
            signal.setitimer(signal.ITIMER_REAL, 20e-6 + i * 4e-6)
            while True:
                pair.run(ROUNDS, (np.zeros((20, 2), np.int64), np.zeros(2, np.int64)))
        except KeyboardInterrupt:
            interrupts += 1
        assert meets(pair)
    assert interrupts == 150


def test_an_interrupt_while_a_thread_is_called(pair):
    """At any line of `call` and of what it uses, one after the other: no lock is left taken."""
    [worker] = pair._workers
    lines, interrupted = 0, True
    while interrupted:
        lines, interrupted = lines + 1, interrupts_at(lines, worker.call)
        assert meets(pair)
    assert lines > 3


def test_an_interrupt_after_a_run_was_announced(pair, monkeypatch):
    announce, left_over = pair._announce, np.zeros(7, np.int64)

    def interrupted(*run):
        announce(*run)
        raise KeyboardInterrupt

    pair.run(SHARES, left_over)
    pair.run(SHARES, left_over)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pair, "_announce", interrupted)
        pair.run(SHARES, left_over)
    time.sleep(0.05)
    left_over[:] = 0
    for _ in range(20):
        job = np.zeros(7, np.int64)
        pair.run(SHARES, job)
        assert (job == 1).all() and not left_over.any(), "nobody does what was called off"


def test_a_team_has_members():
    with pytest.raises(ValueError, match="at least one"):
        Team(0)


def test_closing_ends_the_threads():
    before = set(threading.enumerate())
    team = Team(4)
    made = set(threading.enumerate()) - before
    assert len(made) == 3
    team.close()
    for thread in made:
        thread.join(10)
    assert not any(thread.is_alive() for thread in made)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_a_fork_is_told_that_it_has_no_threads(pair):
    job = np.zeros((1, 2), np.int64), np.zeros(2, np.int64)
    pair.run(ROUNDS, job)
    child = os.fork()
    if child == 0:
        # A thread that waits in compiled code can't be interrupted otherwise.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        try:
            pair.run(ROUNDS, job)
        except RuntimeError as error:
            os._exit(0 if "fork" in str(error) else 1)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_fewer_threads_may_take_part():
    team = Team(3)
    for team.active in (2, 1, 3):
        taken = np.zeros(7, np.int64)
        team.run(SHARES, taken)
        assert (taken == 1).all()
    team.close()


def test_a_run_may_be_worth_fewer_threads():
    team, ran = Team(3), np.zeros(3, np.int64)
    for most, active, expected in ((1, 3, 1), (2, 3, 2), (9, 3, 3), (0, 3, 1), (3, 2, 2)):
        team.active, ran[:] = active, 0
        team.run(WHO_RAN, ran, most=most)
        assert ran.tolist() == [expected] * expected + [0] * (3 - expected)
    team.close()


@pytest.mark.parametrize("pause", [0, 0.0019, 0.01])
def test_runs_follow_each_other_closely_or_not(team, pause):
    """Threads still linger, have just gone to sleep, or sleep; and some are left out now and then."""
    for i in range(60):
        team.active = 1 + i % team.size
        marks, late = np.zeros((3, team.active), np.int64), np.zeros(team.active, np.int64)
        team.run(ROUNDS, (marks, late))
        assert marks.all() and not late.any()
        time.sleep(pause)


def test_lingering_threads_take_the_next_job_or_leave(team):
    """Jobs of one kind, then another kind, then an error in between: nobody works on what was."""
    for i in range(300):
        job = np.zeros(5 + i % 3, np.int64)
        team.run(SHARES, job)
        assert (job == 1).all()
        if i % 10 == 0:
            assert meets(team)
        if i % 50 == 0 and team.size > 1:
            with pytest.raises(ZeroDivisionError):
                team.run(
                    Odd(i // 50 % team.size, lambda: 1 // 0, ROUNDS),
                    (np.zeros((200, 5), np.int64), np.zeros(5, np.int64)),
                )


def test_a_thread_that_lingers_does_not_go_back_to_python(pair, monkeypatch):
    calls, part = [], pair.part
    monkeypatch.setattr(pair, "part", lambda thread, run: calls.append(thread) or part(thread, run))
    for _ in range(200):
        job = np.zeros(7, np.int64)
        pair.run(SHARES, job)
        assert (job == 1).all()
    assert calls.count(0) == 200 and 1 <= calls.count(1) < 200


def test_a_thread_that_lingers_takes_what_is_fixed_now(pair):
    for number in range(200):
        seen = np.full(2, -1)
        pair.run(OWN, seen, number)
        assert seen.tolist() == [number, number]


def test_a_job_has_a_largest_size(pair):
    with pytest.raises(TypeError, match="too large"):
        pair.run(team_program(_own), tuple(np.zeros(1) for _ in range(300)))


def test_a_team_that_has_nothing_to_do_sleeps(pair):
    marks, late = np.zeros((3, 2), np.int64), np.zeros(2, np.int64)
    pair.run(ROUNDS, (marks, late))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.1


def test_each_thread_has_arguments_of_its_own():
    team, seen = Team(3), np.zeros(3, np.int64)
    team.run(OWN, seen, Each([5, 6, 7]))
    assert seen.tolist() == [5, 6, 7]
    team.close()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads can't be bound to cores here")
def test_time_lost_to_others_is_known():
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        team = Team(2)
        marks, late = np.zeros((2000, 2), np.int64), np.zeros(2, np.int64)
        team.prepare(ROUNDS, (marks, late))
        started = time.perf_counter()
        team.run(ROUNDS, (marks, late))
        seconds = time.perf_counter() - started
        assert 0.2 * seconds < team.lost < 2 * seconds, "two threads that wait for each other on one core"
        team.close()
    finally:
        os.sched_setaffinity(0, before)
