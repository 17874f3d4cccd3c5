"""A team of threads that all run the same compiled function (SPMD).

The caller is thread 0; the others are Python threads. Inside a run none holds the GIL: threads meet at `barrier`,
split work with `share`, or take it piece by piece with `claim`. After a run they linger for a moment, for the next step
follows soon, and then sleep on a lock: to wake a thread, and to pass it the GIL, takes some 20 us each.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import typeof, types
from numba.core import cgutils
from numba.extending import intrinsic

from . import cpu
from .jit import kernel

# Places in the sync array, each on a cache line of its own (8 int64); then one for each thread's clock. The number of the
# last run that began stays from run to run, the others start from 0.
_BEGUN, _ARRIVED, _GENERATION, _ABORT, _CLAIMED, _LEFT, _RUN, _CLOCKS, _LINE = 0, 8, 16, 24, 32, 40, 48, 56, 8

# About 10 to 40 us of pauses, then the core is offered to other threads at every look.
_PATIENCE = 1000
# How long a thread lingers, in nanoseconds, and how many looks lie between two at the clock.
_LINGER, _LOOKS = 500_000, 64
# Seconds between looks whether a thread is out of a run that failed.
_POLL = 0.0002

_YIELD = {"win32": "SwitchToThread"}.get(sys.platform, "sched_yield")


def _slot(context, builder, sig, args):
    return builder.gep(context.make_array(sig.args[0])(context, builder, args[0]).data, [args[1]])


@intrinsic
def _atomic_add(typing_context, array, i, value):
    def codegen(context, builder, sig, args):
        return builder.atomic_rmw("add", _slot(context, builder, sig, args), args[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), codegen


@intrinsic
def _atomic_load(typing_context, array, i):
    def codegen(context, builder, sig, args):
        return builder.load_atomic(_slot(context, builder, sig, args), "acquire", 8)

    return types.int64(array, types.intp), codegen


@intrinsic
def _atomic_store(typing_context, array, i, value):
    def codegen(context, builder, sig, args):
        builder.store_atomic(args[2], _slot(context, builder, sig, args), "release", 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), codegen


@intrinsic
def _pause(typing_context):
    """Tell the core that this is a spin loop."""

    def codegen(context, builder, sig, args):
        triple = cpu.target()[0]
        if triple.startswith("x86_64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        elif triple.startswith(("aarch64", "arm64")):
            kind = ir.FunctionType(ir.VoidType(), [ir.IntType(32)])
            hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.aarch64.hint")
            builder.call(hint, [ir.Constant(ir.IntType(32), 1)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _yield_core(typing_context):
    """Let the operating system run another thread on this core."""

    def codegen(context, builder, sig, args):
        if binding.address_of_symbol(_YIELD):
            kind = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, _YIELD), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _nanoseconds(typing_context, clock):
    """What one of the system's clocks shows; 0 where there is no such clock."""

    def codegen(context, builder, sig, args):
        if not binding.address_of_symbol("clock_gettime"):
            return ir.Constant(ir.IntType(64), 0)
        now = cgutils.alloca_once(builder, ir.ArrayType(ir.IntType(64), 2))
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32), now.type])
        call = cgutils.get_or_insert_function(builder.module, kind, "clock_gettime")
        builder.call(call, [builder.trunc(args[0], ir.IntType(32)), now])
        seconds, rest = (builder.extract_value(builder.load(now), i) for i in range(2))
        return builder.add(builder.mul(seconds, ir.Constant(seconds.type, 10**9)), rest)

    return types.int64(types.int64), codegen


_WALL, _CPU = getattr(time, "CLOCK_MONOTONIC", 0), getattr(time, "CLOCK_THREAD_CPUTIME_ID", 0)


@kernel
def enter(sync, rank, size):
    """The first thing that a program for a team does: calls in the threads that linger, and looks at the clock."""
    if rank == 0 and size > 1:
        _atomic_store(sync, _BEGUN, sync[_RUN])
    sync[_CLOCKS + _LINE * rank] = _nanoseconds(_CPU) - _nanoseconds(_WALL)


@kernel
def leave(sync, rank, size):
    """The last thing that it does: thread 0 waits for the others, these linger.

    A program may do without both: then the team looks every now and then whether the others are done, and knows of no
    time lost.
    """
    sync[_CLOCKS + _LINE * rank] += _nanoseconds(_WALL) - _nanoseconds(_CPU)
    if rank > 0:
        run = sync[_RUN]
        _atomic_add(sync, _LEFT, 1)
        _linger(sync, run)
        return
    looks = 0
    while _atomic_load(sync, _LEFT) < size - 1 and _atomic_load(sync, _ABORT) == 0:
        looks = _look_again(looks)


@kernel
def _linger(sync, run):
    """Until a later run has begun, for a while at most. The run's own arrays are not touched any more.

    The core is not offered to others: who gives it up waits for their turn to end, who sleeps is woken at once.
    """
    began = _nanoseconds(_WALL)
    for look in range(_LINGER // 10):
        if _atomic_load(sync, _BEGUN) != run or _atomic_load(sync, _ABORT) != 0:
            return
        _pause()
        if look % _LOOKS == _LOOKS - 1 and _nanoseconds(_WALL) - began > _LINGER:
            return


@kernel
def _look_again(looks):
    """Between two looks of a thread that waits for others; returns looks + 1."""
    if looks < _PATIENCE:
        _pause()
    else:
        _yield_core()
    return looks + 1


@kernel
def barrier(sync, size):
    """Wait until all `size` threads are here. Resets `claim`. After an abort it lets everybody through."""
    if size == 1:
        _atomic_store(sync, _CLAIMED, 0)
        return
    generation = _atomic_load(sync, _GENERATION)
    if _atomic_add(sync, _ARRIVED, 1) == size - 1:
        _atomic_store(sync, _ARRIVED, 0)
        _atomic_store(sync, _CLAIMED, 0)
        _atomic_store(sync, _GENERATION, generation + 1)
        return
    looks = 0
    while _atomic_load(sync, _GENERATION) == generation and _atomic_load(sync, _ABORT) == 0:
        looks = _look_again(looks)


@kernel
def share(total, rank, size):
    """(first, end) of thread `rank`'s part of range(total): contiguous, sizes differ by at most one."""
    return total * rank // size, total * (rank + 1) // size


@kernel
def claim(sync):
    """The next number of 0, 1, 2 ... that no thread has taken since the last barrier."""
    return _atomic_add(sync, _CLAIMED, 1)


class _Worker:
    """One thread beside the caller: waits for a job and runs its part."""

    def __init__(self, team: "Team", rank: int):
        self._team, self._rank = team, rank
        self._error: BaseException | None = None
        self._started = self._done = 0
        self._go = threading.Lock()
        self._go.acquire()
        self._thread = threading.Thread(target=self._loop, name=f"minilora-{rank}", daemon=True)
        self._thread.start()

    def start(self) -> None:
        self._started += 1
        self._go.release()

    def end(self) -> None:
        """Without a job, `start` ends the thread."""
        self.start()
        self._thread.join()

    def wait(self) -> BaseException | None:
        """Until the job is done, Ctrl-C or not: leaving earlier would leave a thread in the team's arrays."""
        interrupted: BaseException | None = None
        while self._done < self._started:
            try:
                time.sleep(_POLL)
            except KeyboardInterrupt as interrupt:
                interrupted = interrupt
        error, self._error = self._error, None
        return error or interrupted

    def _loop(self) -> None:
        while True:
            self._go.acquire()
            if self._team.job is None:
                return
            try:
                self._team.call(self._rank)
            except BaseException as error:
                self._error = error
                self._team.abort()
            self._done += 1


class Each(list):
    """An argument of which every thread of a team gets its own: one value for each."""


class Team:
    """`size` threads that run compiled functions together.

    size: number of threads, the caller's included. active: how many of them take part in a run, may be changed between
    two. cpus: for each thread the cores that it is bound to while it runs; None binds none. Raises ValueError where
    size is below 1.
    """

    def __init__(self, size: int, cpus: list[frozenset[int]] | None = None):
        if size < 1:
            raise ValueError(f"a team needs at least one thread, not {size}")
        self._cpus = cpus
        self.size = self.active = size
        self.job: tuple | None = None
        self._sync = np.zeros(_CLOCKS + _LINE * size, np.int64)
        self._runs = 0
        self._lock = threading.Lock()
        self._compiled: set[Any] = set()
        self._workers = [_Worker(self, rank) for rank in range(1, size)]

    def run(self, program, *args: Any, most: int | None = None) -> None:
        """program(rank, count, sync, *args) on every active thread, or on `most` of them; returns when all are done.

        An exception in any thread, Ctrl-C included, frees the others from their barriers and is raised here.
        """
        with self._lock:
            self.prepare(program, *args)
            count = self.active if most is None else max(1, min(most, self.active))
            self._runs += 1
            self._sync[_BEGUN + 1 :] = 0
            self._sync[_RUN] = self._runs
            self.job = (program, args, count)
            started: list[_Worker] = []
            error: BaseException | None = None
            try:
                for worker in self._workers[: count - 1]:
                    worker.start()
                    started.append(worker)
                self.call(0)
            except BaseException as cause:
                error = cause
                self.abort()
            if self._sync[_LEFT] < len(started) or self._sync[_ABORT]:
                for worker in started:
                    error = worker.wait() or error
            if error is not None:
                raise error

    def prepare(self, program, *args: Any) -> None:
        """Compile a program for arguments like these, unless it is; in this thread, whose memory serves again."""
        if program not in self._compiled:
            own = (arg[0] if isinstance(arg, Each) else arg for arg in args)
            program.compile(tuple(typeof(arg) for arg in (0, self.size, self._sync, *own)))
            self._compiled.add(program)

    def call(self, rank: int) -> None:
        """Thread `rank`'s part of the running job."""
        if self.job is not None:
            program, args, count = self.job
            own = (arg[rank] if isinstance(arg, Each) else arg for arg in args)
            with self._bound(rank):
                program(rank, count, self._sync, *own)

    @contextmanager
    def _bound(self, rank: int) -> Iterator[None]:
        """Keep this thread on its cores. The caller's goes back to where it was allowed to be."""
        if self._cpus is None:
            yield
            return
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._cpus[rank])
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)

    @property
    def lost(self) -> float:
        """Seconds of the last run that its threads, all together, could not run: others had their cores."""
        return sum(self._sync[_CLOCKS::_LINE].tolist()) / 1e9

    def abort(self) -> None:
        """Open every barrier of the running job: its results are void."""
        self._sync[_ABORT] = 1

    def close(self) -> None:
        """End the threads; the team can't run again."""
        with self._lock:
            self.job = None
            for worker in self._workers:
                worker.end()
            self._workers = []
