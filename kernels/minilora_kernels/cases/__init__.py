"""One row for each public kernel: its twin, how to make inputs, how close the two must be, and what it costs.

Tests and bench/kernels.py both loop over CASES; a new kernel is a function, a twin and a row in the file of its name here.
"""

from . import attention, convert, linear, lora, pointwise, sample
from .case import Case, Scratch
from .linear import empty_rows

__all__ = ["CASES", "Case", "Scratch", "empty_rows"]

CASES: list[Case] = [case for part in (linear, pointwise, attention, lora, sample, convert) for case in part.CASES]
