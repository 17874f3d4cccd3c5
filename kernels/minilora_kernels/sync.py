"""What the threads of a team share while they run: compiled code over one array, `sync`, without locks.

Threads meet at `barrier`, or do something else between `arrive` and `wait`; they split work with `share`, take it piece
by piece with `claim`, or help each other with it, see `stealing`. Each thread's part of a run is bracketed by `begin`
and `end`. A thread that is done spins for up to 2 ms, since the next run usually follows at once, and joins it without
returning to Python: waking a thread and handing it the GIL and its arguments takes some 50 to 100 us.
"""

import time

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .atomics import atomic_add, atomic_load, atomic_store, nanoseconds, pause, slot_of, yield_core
from .jit import kernel

# Places in sync, most of them on a cache line of their own (LINE numbers). RUN, KIND: the caller's number of a run and
# of its kind; runs of a kind differ in their jobs only. LOST: wall time less CPU time, summed over the run's threads,
# in nanoseconds. From JOB on: the job. From THREADS on: a line for each thread.
LINE = 8
BEGUN, ARRIVED, GENERATION, ABORT, CLAIMED, LEFT, ARRIVALS, RUN = range(0, 8 * LINE, LINE)
KIND = RUN + 1
LOST = RUN + 2
JOB, JOB_WORDS = RUN + LINE, 256
THREADS = JOB + JOB_WORDS
# In a thread's line: its clock, whether it lingers, the last run that it took part in and, in this run, its arrivals,
# the number of its work, and its part of that.
CLOCK, LINGERS, LAST, MY_ARRIVALS, WORK, PART = range(6)

# After about 10 to 40 us of pauses the core is offered to other threads at every look.
_PATIENCE = 1000
# How long a thread lingers, in nanoseconds, and after how many looks it reads the clock.
_LINGER, _LOOKS = 2_000_000, 64


@intrinsic
def _put_job(typing_context, sync, job):
    def codegen(context, builder, sig, args):
        builder.store(args[1], _job_slot(context, builder, sig, args))
        return context.get_dummy_value()

    return types.void(sync, job), codegen


@intrinsic
def take_job(typing_context, sync, like):
    """The job that thread 0 began the run with; `like`: any value of its type."""

    def codegen(context, builder, sig, args):
        return builder.load(_job_slot(context, builder, sig, args))

    return like(sync, like), codegen


def _job_slot(context, builder, sig, args):
    kind = args[1].type
    if (size := context.get_abi_sizeof(kind)) > 8 * JOB_WORDS:
        raise TypeError(f"a job of {size} bytes is too large: a team passes on {8 * JOB_WORDS}")
    at = slot_of(context, builder, sig, (args[0], ir.Constant(ir.IntType(64), JOB)))
    return builder.bitcast(at, kind.as_pointer())


_WALL, _CPU = getattr(time, "CLOCK_MONOTONIC", 0), getattr(time, "CLOCK_THREAD_CPUTIME_ID", 0)


@kernel
def begin(sync, thread, threads, job):
    """Thread 0 hands the job to all; the others wait for it, unless the run is aborted before."""
    if thread == 0:
        for place in (ARRIVED, CLAIMED, LEFT, ARRIVALS):
            sync[place] = 0
        for each in range(threads):
            sync[THREADS + LINE * each + PART] = 0
        _put_job(sync, job)
        atomic_store(sync, BEGUN, sync[RUN])
    looks = 0
    while atomic_load(sync, BEGUN) != sync[RUN] and atomic_load(sync, ABORT) == 0:
        looks = _look_again(looks)
    line = THREADS + LINE * thread
    sync[line + LAST], sync[line + MY_ARRIVALS], sync[line + WORK] = sync[RUN], 0, 0
    sync[line + CLOCK] = nanoseconds(_CPU) - nanoseconds(_WALL)


@kernel
def end(sync, thread, threads):
    """Thread 0 waits for the others. These linger; returns whether another run of this kind has begun meanwhile."""
    line = THREADS + LINE * thread
    sync[line + CLOCK] += nanoseconds(_WALL) - nanoseconds(_CPU)
    if thread > 0:
        run, kind = sync[RUN], sync[KIND]
        atomic_store(sync, line + LINGERS, 1)
        atomic_add(sync, LEFT, 1)
        called = _linger(sync, run) and sync[KIND] == kind
        atomic_store(sync, line + LINGERS, 0)
        return called
    looks = 0
    while atomic_load(sync, LEFT) < threads - 1 and atomic_load(sync, ABORT) == 0:
        looks = _look_again(looks)
    sync[LOST] = 0
    for each in range(threads):
        sync[LOST] += sync[THREADS + LINE * each + CLOCK]
    return False


@kernel
def _linger(sync, run):
    """Wait for a later run to begin, for a while; returns whether one has. No array but sync is touched.

    It does not yield: a thread that yields waits until the other's time slice ends, one that sleeps is woken at once.
    """
    began = nanoseconds(_WALL)
    for look in range(_LINGER // 10):
        if atomic_load(sync, ABORT) != 0:
            return False
        if atomic_load(sync, BEGUN) != run:
            return True
        if look % _LOOKS == _LOOKS - 1 and nanoseconds(_WALL) - began > _LINGER:
            return False
        pause()
    return False


@kernel
def _look_again(looks):
    """What a waiting thread does between two looks; returns looks + 1."""
    if looks < _PATIENCE:
        pause()
    else:
        yield_core()
    return looks + 1


@kernel
def barrier(sync, threads):
    """Wait until all `threads` threads are here. Resets `claim`. After an abort it lets everybody through."""
    if threads == 1:
        atomic_store(sync, CLAIMED, 0)
        return
    generation = atomic_load(sync, GENERATION)
    if atomic_add(sync, ARRIVED, 1) == threads - 1:
        atomic_store(sync, ARRIVED, 0)
        atomic_store(sync, CLAIMED, 0)
        atomic_store(sync, GENERATION, generation + 1)
        return
    looks = 0
    while atomic_load(sync, GENERATION) == generation and atomic_load(sync, ABORT) == 0:
        looks = _look_again(looks)


@kernel
def arrive(sync, thread):
    """The first half of a barrier that leaves `claim` alone; the second is `wait`.

    Between two arrivals of a thread there must be a wait or a barrier.
    """
    sync[THREADS + LINE * thread + MY_ARRIVALS] += 1
    atomic_add(sync, ARRIVALS, 1)


@kernel
def wait(sync, thread, threads):
    """Wait until all threads have arrived as often as this one. After an abort it lets everybody through."""
    due, looks = threads * sync[THREADS + LINE * thread + MY_ARRIVALS], 0
    while atomic_load(sync, ARRIVALS) < due and atomic_load(sync, ABORT) == 0:
        looks = _look_again(looks)


@kernel
def share(total, thread, threads):
    """(first, end) of thread `thread`'s part of range(total): contiguous, sizes differ by at most one."""
    return total * thread // threads, total * (thread + 1) // threads


@kernel
def claim(sync):
    """The next number of 0, 1, 2 ... that no thread has taken since the last barrier."""
    return atomic_add(sync, CLAIMED, 1)
