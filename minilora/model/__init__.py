"""The forward step of a Llama-family decoder: one compiled function that every thread of the team runs.

A step takes T rows: any mix of prefill chunks and decodes of B sequences, with any adapters. Each phase splits its work
over the threads, which help each other with long work; a barrier ends it:

    embed | norm, q k v, rotate, write pages | attend | o | norm, gate up, silu | down | ... | norm, head

    step.py         the order of the phases
    arrays.py       what they work on
    work.py         how threads share it
    rows.py         inputs of the products: norm, quantisation; which rows go on to the end
    projection.py   q k v, rotation, pages
    attention.py    attention
    products.py     o, gate up and down
    head.py         logits and the choice of tokens
    lora.py         the embedding, and what adapters add to each product

Rows whose logits nobody wants leave the last layer once their keys and values are in their pages.
For up to FEW rows every thread normalises and quantises all of them itself, which costs less than a barrier; only the
head's rows are always shared out. With adapters, `shrink` comes before each product, and `expand` after it, when all
threads have shrunk. A step may go on in further rounds, each with the tokens that the previous one chose. Whatever the
batch and the team, each number is computed by the same operations in the same order.

Products, attention, adapters' tiles and sampling are units of their own, see minilora_kernels.unit: compiled beside the
rest.
"""

from .arrays import FEW, Buffers, Fixed, Shape
from .step import make_step
from .work import CHUNK_BLOCKS, MOST_ROWS

__all__ = ["CHUNK_BLOCKS", "FEW", "MOST_ROWS", "Buffers", "Fixed", "Shape", "make_step"]
