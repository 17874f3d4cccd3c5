"""The end of a step: logits, and the choice of tokens."""

import numpy as np

from minilora_kernels.batch import CHOICE_ROW, choose
from minilora_kernels.jit import kernel
from minilora_kernels.lora_expand import Place
from minilora_kernels.pack import BLOCK, GROUP, PANEL, ROWS
from minilora_kernels.sample import argmax
from minilora_kernels.sync import barrier, claim

from .rows import norm_row
from .work import bytes_of, first_piece, next_piece, share_of, work_of

# Instead of a column where a thread had none.
NONE = -1


def make_logits(product, shrink_all, expand_all):
    """The kernel logits."""

    @kernel
    def logits(c):
        """Logits of all rows, -inf beyond the vocabulary. Ends with a barrier."""
        w, shape, b = c.w, c.shape, c.buffers
        count, group, padded = len(c.rows.tokens), w.matrices[w.head, GROUP], w.matrices[w.head, ROWS]
        low, high = share_of(c, count)
        for j in range(low, high):
            norm_row(c, w.final_norm, group, j, j)
        barrier(c.sync, c.threads)
        shrink_all(c, shape.layers, 0, shape.width, group, b.a, 0, 0, 0, padded)
        for j in range(count):
            b.bests[j * c.threads + c.thread] = NONE
        work = work_of(c, padded // BLOCK, count, count, bytes_of(c, w.head, count), 1)
        block0, block1 = first_piece(c, work)
        while block0 < block1:
            column, end = block0 * BLOCK, block1 * BLOCK
            product(c, w.head, b.a, 0, count, block0, block1, b.logits, column, padded, 0)
            panel0, panel1 = 2 * block0, min(2 * block1, (shape.vocabulary + PANEL - 1) // PANEL)
            to = Place(b.logits, 0, padded, PANEL)
            expand_all(c, shape.layers, 0, 0, count, panel0, panel1, to, 0, panel0)
            for j in range(count):
                at, mine = j * padded, j * c.threads + c.thread
                for i in range(max(shape.vocabulary, column), end):
                    b.logits[at + i] = -np.inf
                best = column + argmax(b.logits, at + column, end - column)
                b.bests[mine] = better(b.logits, at, b.bests[mine], best)
            block0, block1 = next_piece(c, work, block1, block1)
        barrier(c.sync, c.threads)

    return logits


@kernel
def choose_all(c):
    """The tokens of batch.choices, as threads come free. Ends with a barrier."""
    batch, b, padded = c.batch, c.buffers, c.w.matrices[c.w.head, ROWS]
    i = claim(c.sync)
    while i < len(batch.choices):
        best = _best(c, batch.choices[i, CHOICE_ROW], padded)
        choose(batch, i, c.turn, best, b.logits, padded, b.chances, b.ids, c.thread * padded)
        i = claim(c.sync)
    barrier(c.sync, c.threads)


@kernel
def _best(c, row, padded):
    """The best of all threads' best columns of a row, by argmax's rules."""
    best = NONE
    for thread in range(c.threads):
        best = better(c.buffers.logits, row * padded, best, c.buffers.bests[row * c.threads + thread])
    return best


@kernel
def better(logits, at, i, j):
    """The better of two columns by argmax's rules, in either order; NONE loses to any."""
    first, second = min(i, j), max(i, j)
    if first == NONE or not (np.isnan(logits[at + first]) or logits[at + second] <= logits[at + first]):
        return second
    return first
