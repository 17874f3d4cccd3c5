"""The end of a step: logits, and the choice of tokens."""

import numpy as np

from minilora_kernels.batch import CHOICE_ROW, choose
from minilora_kernels.jit import kernel
from minilora_kernels.pack import BLOCK, GROUP, PANEL, ROWS
from minilora_kernels.sample import argmax
from minilora_kernels.sync import barrier, claim

from .arrays import Place, share_of
from .rows import norm_row


def make_logits(linear, shrink_all, expand_all):
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
        shrink_all(c, shape.layers, 0, shape.width, group, b.a, 0, 0)
        block0, block1 = share_of(c, padded // BLOCK)
        linear(w.arena, w.matrices, w.head, b.a, 0, count, block0, block1, b.logits, block0 * BLOCK, padded, 0)
        panel0, panel1 = 2 * block0, min(2 * block1, (shape.vocabulary + PANEL - 1) // PANEL)
        to = Place(b.logits, 0, padded, PANEL)
        expand_all(c, shape.layers, 0, 0, count, panel0, panel1, to, 0, panel0)
        for j in range(count):
            for i in range(max(shape.vocabulary, block0 * BLOCK), block1 * BLOCK):
                b.logits[j * padded + i] = -np.inf
            first = block0 * BLOCK
            b.bests[j * c.threads + c.thread] = first + argmax(b.logits, j * padded + first, (block1 - block0) * BLOCK)
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
    """The best of all threads' best columns of a row, as argmax has it: threads have them in order."""
    b = c.buffers
    best = b.bests[row * c.threads]
    for thread in range(1, c.threads):
        other = b.bests[row * c.threads + thread]
        so_far = b.logits[row * padded + best]
        if not (np.isnan(so_far) or b.logits[row * padded + other] <= so_far):
            best = other
    return best
