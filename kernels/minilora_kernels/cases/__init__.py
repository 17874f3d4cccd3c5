"""One row for each kernel that computes whole results: its twin, how to make inputs, how close both must be, its cost.

Tests and bench/kernels.py both loop over CASES; a new kernel is a function, a twin and a row in the file of its name
here.
"""

from . import attention, convert, linear, lora, pointwise, sample
from .case import Case, Scratch
from .linear import empty_rows

__all__ = ["CASES", "Case", "Scratch", "empty_rows"]

CASES: list[Case] = [case for part in (linear, pointwise, attention, lora, sample, convert) for case in part.CASES]
