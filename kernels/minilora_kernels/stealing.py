"""Work that threads help each other with: one that is done takes from the others what they have not begun.

The items of a work are numbers from 0 on. Each thread has a contiguous part of them and takes pieces from its front;
one that has none left takes half of the largest part, from its end (work stealing, after Blumofe and Leiserson 1999,
doi:10.1145/324133.324234). So threads of equal speed read memory as if each worked alone, and slower ones hold up
nobody.

Between two barriers there is one work. A part is one number in its thread's line of `sync`, made of the work's number
in this run, the first item and the end, and changes by compare-and-swap. A part whose thread has not left the barrier
yet still carries the previous work's number. That work is finished, so a thief takes the part to be the thread's whole
initial share.
"""

from .atomics import atomic_compare_swap, atomic_load, atomic_store
from .jit import kernel
from .sync import ABORT, LINE, PART, THREADS, WORK, share

# Bits of an item; works are numbered modulo NUMBERS, as no part is older than the previous work.
_BITS = 28
MOST_ITEMS = 1 << _BITS
NUMBERS = 1 << 7
# A thread takes one of so many pieces of its part at a time: nobody can help with what it has taken.
_PIECES = 4


@kernel
def begin_work(sync, thread):
    """To be called once by every thread, after a barrier, before it takes from a work."""
    line = THREADS + LINE * thread
    sync[line + WORK] = (sync[line + WORK] + 1) % NUMBERS


@kernel
def take(sync, thread, threads, total, grain):
    """(first, end) of the items, fewer than MOST_ITEMS, that this thread does next; empty when none is left to take.

    grain: how many are best done in one go; pieces are multiples of it while enough are left. After an abort nothing
    is left: then barriers hold nobody, and a thread in the next work must not touch the parts of this one.
    """
    at, number = THREADS + LINE * thread + PART, sync[THREADS + LINE * thread + WORK]
    while atomic_load(sync, ABORT) == 0:
        word, first, end = _part(sync, number, total, thread, threads)
        size = _piece(end - first, grain)
        # An empty part is written too: it must not be older than the previous work.
        if atomic_compare_swap(sync, at, word, _packed(number, first + size, end)):
            if size > 0:
                return first, first + size
            return _steal(sync, at, number, total, thread, threads, grain)
    return total, total


@kernel
def _steal(sync, at, number, total, thread, threads, grain):
    """Take half of the largest part of another thread: a piece of it to do now, the rest as this thread's part."""
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
