"""Work that threads help each other with: who is done takes from the others what they have not begun.

The items of a work are numbers from 0 on. Each thread has a contiguous part of them and takes pieces from its front; who
has none left takes half of the largest part from its end (work stealing, after Blumofe and Leiserson 1999,
doi:10.1145/324133.324234). So threads of equal speed go through memory as if each had its part for itself, and slower ones
hold up nobody.

Between two barriers there is one work. A part is one number in its thread's line of `sync`, made of the work's number in
this run, the first item and the end, and changes by compare-and-swap. Who looks at a part whose thread is still on its way
from the barrier sees the work before, all of which is done, and takes from what that thread will begin with.
"""

from .atomics import atomic_compare_swap, atomic_load, atomic_store
from .jit import kernel
from .sync import ABORT, LINE, PART, THREADS, WORK, share

# Bits of an item, and what works are numbered modulo: no part is older than the work before.
_BITS = 28
MOST_ITEMS = 1 << _BITS
NUMBERS = 1 << 7
# A thread takes one of so many pieces of its part at a time: with what it has taken nobody can help it.
_PIECES = 4


@kernel
def begin_work(sync, thread):
    """To be called once by every thread, after a barrier, before it takes from a work."""
    line = THREADS + LINE * thread
    sync[line + WORK] = (sync[line + WORK] + 1) % NUMBERS


@kernel
def take(sync, thread, threads, total, grain):
    """(first, end) of the items that this thread does next, of fewer than MOST_ITEMS; empty where nothing is left to take.

    grain: how many are best done in one go; pieces are multiples of it, while there are so many. After an abort nothing
    is left: then barriers hold nobody, and who is in the next work must not touch the parts of this one.
    """
    at, number = THREADS + LINE * thread + PART, sync[THREADS + LINE * thread + WORK]
    while atomic_load(sync, ABORT) == 0:
        word, first, end = _part(sync, number, total, thread, threads)
        size = _piece(end - first, grain)
        # An empty part is written too: it must not be older than the work before.
        if atomic_compare_swap(sync, at, word, _packed(number, first + size, end)):
            if size > 0:
                return first, first + size
            return _steal(sync, at, number, total, thread, threads, grain)
    return total, total


@kernel
def _steal(sync, at, number, total, thread, threads, grain):
    """Half of the largest part of another thread: a piece of it to do, the rest becomes this thread's part."""
    while True:
        victim, most = thread, 0
        for step in range(1, threads):
            other = (thread + step) % threads
            _, first, end = _part(sync, number, total, other, threads)
            if end - first > most:
                victim, most = other, end - first
        if most == 0:
            return total, total
        word, first, end = _part(sync, number, total, victim, threads)
        middle, place = first + (end - first) // 2, THREADS + LINE * victim + PART
        if first < end and atomic_compare_swap(sync, place, word, _packed(number, first, middle)):
            last = middle + _piece(end - middle, grain)
            atomic_store(sync, at, _packed(number, last, end))
            return middle, last


@kernel
def _piece(left, grain):
    """How many items a thread takes at a time of a part of so many."""
    return min(left, (left + _PIECES * grain - 1) // (_PIECES * grain) * grain)


@kernel
def _part(sync, number, total, thread, threads):
    """(what is in a thread's line, first, end): what is left of its part of a work."""
    word = atomic_load(sync, THREADS + LINE * thread + PART)
    if word >> 2 * _BITS == number:
        return word, (word >> _BITS) % MOST_ITEMS, word % MOST_ITEMS
    first, end = share(total, thread, threads)
    return word, first, end


@kernel
def _packed(number, first, end):
    return (number << 2 * _BITS) | (first << _BITS) | end
