"""NumPy twins of the kernels that compute whole results: same name, same signature, slow and obvious.

These are products, attention, LoRA, rows, sampling and conversion; beside them is what checks dot products and wide
integers. Arrays are flat, as in the kernels; each twin first cuts out what its kernel would touch. The files have the
names of those in `cases`.
"""

from .attention import attend, attend_part, merge_parts, write_key, write_value
from .convert import fit_ranges, narrow, quantize_panels, widen
from .linear import dot4, linear
from .lora import from_wide, make_lora, to_wide, wide_integers, wide_words
from .pointwise import add_row, embed, quantize_row, quantize_row_finely, rms_norm, rope, round_row, silu_mul
from .sample import argmax, log_sum_exp, rank, sample, top, uniform

__all__ = [
    "add_row",
    "argmax",
    "attend",
    "attend_part",
    "dot4",
    "embed",
    "fit_ranges",
    "from_wide",
    "linear",
    "log_sum_exp",
    "make_lora",
    "merge_parts",
    "narrow",
    "quantize_panels",
    "quantize_row",
    "quantize_row_finely",
    "rank",
    "rms_norm",
    "rope",
    "round_row",
    "sample",
    "silu_mul",
    "to_wide",
    "top",
    "uniform",
    "wide_integers",
    "wide_words",
    "widen",
    "write_key",
    "write_value",
]
