"""A team of threads that all run the same compiled function (SPMD).

The caller is thread 0; the others are Python threads. Inside a run none holds the GIL: `sync` says how they meet there.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
from numba import typeof

from .jit import program
from .memory import aligned_zeros
from .sync import ABORT, KIND, LAST, LINE, LINGERS, LOST, RUN, THREADS, begin, end, take_job

# Seconds between two looks whether a thread has left a run that failed.
_POLL = 0.0002


def team_program(body: Callable, constants: tuple = (), units: Iterable[Any] = ()) -> Callable:
    """A kernel body(thread, threads, sync, job, fixed) as a program for Team.run. constants, units: see jit.program."""

    def part(thread, threads, sync, job, fixed):
        going = True
        while going:
            begin(sync, thread, threads, job)
            body(thread, threads, sync, job, fixed)
            going = end(sync, thread, threads)
            if going:
                job = take_job(sync, job)

    return program(part, constants, body, units)


class Each(list):
    """What is fixed for a program, where each thread of a team has its own: one value for each."""


class _Run(NamedTuple):
    """What the first `threads` threads of a team do."""

    number: int
    threads: int
    program: Any
    job: Any
    fixed: Any


_NOTHING = _Run(0, 0, None, (), ())


class _Worker:
    """One thread beside the caller: waits for a run that it is in and does its part."""

    def __init__(self, team: "Team", number: int):
        self._team, self._number = team, number
        self._error: BaseException | None = None
        self._last = 0
        # Open when there may be news. Not a Condition: Ctrl-C can leave its lock taken, and the thread waiting.
        self._news = threading.Lock()
        self._news.acquire()
        self._thread = threading.Thread(target=self._loop, name=f"minilora-{number}", daemon=True)
        self._thread.start()

    def call(self) -> None:
        """Wake the thread, if it sleeps, after a new run was announced."""
        with suppress(RuntimeError):
            # Where it is open already this raises: the thread has yet to look.
            self._news.release()

    def join(self) -> None:
        """Wait for the thread's end."""
        self._thread.join()

    def wait(self, run: _Run) -> BaseException | None:
        """Wait until its part is done, Ctrl-C or not: leaving earlier would leave a thread in the team's arrays."""
        interrupted: BaseException | None = None
        self.call()
        while self._last < run.number:
            try:
                time.sleep(_POLL)
            except KeyboardInterrupt as interrupt:
                interrupted = interrupt
        error, self._error = self._error, None
        return error or interrupted

    def _loop(self) -> None:
        while (run := self._next()) is not None:
            try:
                self._team.part(self._number, run)
            except BaseException as error:
                self._error = error
                self._team.abort()
            # In compiled code it may have gone on to later runs.
            self._last = max(run.number, self._team.last(self._number))

    def _next(self) -> _Run | None:
        """The next run that this thread is in; None when there will be none."""
        while (run := self._team.current) is not None:
            if run.number > self._last and self._number < run.threads:
                return run
            self._news.acquire()
        return None


class Team:
    """`size` threads that run compiled functions together.

    size: number of threads, the caller's included. active: how many of them take part in a run; may be changed between
    runs. cpus: for each thread the cores that it is bound to while it runs; None binds none. Raises ValueError where
    size is below 1.
    """

    def __init__(self, size: int, cpus: list[frozenset[int]] | None = None):
        if size < 1:
            raise ValueError(f"a team needs at least one thread, not {size}")
        self._cpus = cpus
        self._process = os.getpid()
        self.size = self.active = size
        self._last_run, self._dismissed = _NOTHING, False
        self._sync = aligned_zeros(THREADS + LINE * size, np.int64)
        self._lock = threading.Lock()
        self._compiled: set[Any] = set()
        self._workers = [_Worker(self, number) for number in range(1, size)]

    @property
    def current(self) -> _Run | None:
        """The last run that was announced; None when there will be no more."""
        return None if self._dismissed else self._last_run

    def run(self, program, job: Any, fixed: Any = (), most: int | None = None) -> None:
        """Run a team_program on every active thread, or on `most` of them; returns when all are done.

        job: what changes from run to run; fixed: what many runs share, given as the very same object. An exception in
        any thread, Ctrl-C included, frees the others from their barriers and is raised here. Raises RuntimeError after
        close, and in a fork of the process that made the team.
        """
        if os.getpid() != self._process:
            raise RuntimeError(
                "the team's threads are in the process that made it, and this is a fork of that\n"
                "Start the model in the process that uses it, or start processes by spawn instead of fork."
            )
        with self._lock:
            if self._dismissed:
                raise RuntimeError("the team was closed")
            self._settle()
            self.prepare(program, job, fixed)
            count = self.active if most is None else max(1, min(most, self.active))
            error: BaseException | None = None
            try:
                run = self._announce(program, job, fixed, count)
                for thread, worker in enumerate(self._workers[: count - 1], 1):
                    # One that stops lingering just now looks for a new run before it sleeps.
                    if not self._sync[THREADS + LINE * thread + LINGERS]:
                        worker.call()
                self.part(0, run)
            except BaseException as cause:
                error = cause
                self.abort()
            error = self._settle() or error
            if error is not None:
                raise error

    def _settle(self) -> BaseException | None:
        """After an abort: wait until nobody is in the team's arrays any more; returns what went wrong there."""
        error: BaseException | None = None
        if self._sync[ABORT]:
            for worker in self._workers[: self._last_run.threads - 1]:
                error = worker.wait(self._last_run) or error
            self._sync[ABORT] = 0
        return error

    def _announce(self, program, job: Any, fixed: Any, count: int) -> _Run:
        before = self._last_run
        if before.program is not program or before.fixed is not fixed or before.threads != count:
            self._sync[KIND] += 1
        run = _Run(before.number + 1, count, program, job, fixed)
        self._sync[RUN] = run.number
        self._last_run = run
        return run

    def prepare(self, program, job: Any, fixed: Any = ()) -> None:
        """Compile a program for arguments of these types, unless it was compiled before, for whatever types.

        In the calling thread, so that the memory that compiling takes is used again.
        """
        if program not in self._compiled:
            own = fixed[0] if isinstance(fixed, Each) else fixed
            program.compile(tuple(typeof(arg) for arg in (0, self.size, self._sync, job, own)))
            self._compiled.add(program)

    def part(self, thread: int, run: _Run) -> None:
        """Thread `thread`'s part of a run."""
        own = run.fixed[thread] if isinstance(run.fixed, Each) else run.fixed
        if self._cpus is None:
            run.program(thread, run.threads, self._sync, run.job, own)
        else:
            with _bound(self._cpus[thread]):
                run.program(thread, run.threads, self._sync, run.job, own)

    def last(self, thread: int) -> int:
        """The number of the last run that a thread began."""
        return int(self._sync[THREADS + LINE * thread + LAST])

    @property
    def lost(self) -> float:
        """Wall time less CPU time of the last run, in seconds, summed over its threads: others had their cores."""
        return int(self._sync[LOST]) / 1e9

    def abort(self) -> None:
        """Open every barrier of the current run: its results are void."""
        self._sync[ABORT] = 1

    def dismiss(self) -> None:
        """Let the threads end, without waiting for it; the team can't run again. From any thread, its own included."""
        self._dismissed = True
        for worker in self._workers:
            worker.call()

    def close(self) -> None:
        """End the threads; the team can't run again."""
        with self._lock:
            self.dismiss()
            for worker in self._workers:
                worker.join()
            self._workers = []


@contextmanager
def _bound(cpus: frozenset[int]) -> Iterator[None]:
    """Bind this thread to some cores; afterwards it may run where it could before."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
