"""Work that threads share out and help each other with: who is done takes from the others what they have not begun.

Each has a contiguous part of a range of numbers and takes pieces from its front; who has none left takes half of the
largest part from its end (work stealing: Blumofe and Leiserson 1999, doi:10.1145/324133.324234). So threads of equal
speed go through memory as if each had its part for itself, and slower ones hold up nobody.

Between two barriers there is one such range. A part is one number in its thread's line of `sync`, the number of the range
in this run, the first and the end, and changes by compare-and-swap. Who looks at a part whose thread is still on its way
from the barrier sees the range before, all of which is done, and takes from what that thread will begin with.
"""

from .atomics import atomic_load, atomic_store, atomic_swap
from .jit import kernel
from .sync import LINE, PART, THREADS, WORK, share

# Bits of first and of end, and what the number of a range is counted modulo: no part is older than the range before.
_BITS = 28
MOST = 1 << _BITS
_NUMBERS = 1 << 7
# A thread takes one of so many pieces of its part at a time: with what it has taken nobody can help it.
_PIECES = 4


@kernel
def begin_work(sync, thread):
    """To be called by every thread before it takes from a range."""
    line = THREADS + LINE * thread
    sync[line + WORK] = (sync[line + WORK] + 1) % _NUMBERS


@kernel
def take(sync, thread, threads, total, grain):
    """(first, end) of what this thread does next of range(total), total < MOST; empty where nothing is left to take.

    grain: how many numbers are best done in one go; pieces are multiples of it, while there are so many.
    """
    at, number = THREADS + LINE * thread + PART, sync[THREADS + LINE * thread + WORK]
    while True:
        word, first, end = _part(sync, number, total, thread, threads)
        size = _piece(end - first, grain)
        # An empty part is written too: it must not be older than the range before.
        if atomic_swap(sync, at, word, _packed(number, first + size, end)):
            if size > 0:
                return first, first + size
            return _steal(sync, at, number, total, thread, threads, grain)


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
        middle = first + (end - first) // 2
        if first < end and atomic_swap(sync, THREADS + LINE * victim + PART, word, _packed(number, first, middle)):
            last = middle + _piece(end - middle, grain)
            atomic_store(sync, at, _packed(number, last, end))
            return middle, last


@kernel
def _piece(left, grain):
    """How many of so many numbers a thread takes from its part at a time."""
    return min(left, (left + _PIECES * grain - 1) // (_PIECES * grain) * grain)


@kernel
def _part(sync, number, total, thread, threads):
    """(what is in a thread's line, first, end): what is left of its part."""
    word = atomic_load(sync, THREADS + LINE * thread + PART)
    if word >> 2 * _BITS == number:
        return word, (word >> _BITS) % MOST, word % MOST
    first, end = share(total, thread, threads)
    return word, first, end


@kernel
def _packed(number, first, end):
    return (number << 2 * _BITS) | (first << _BITS) | end
