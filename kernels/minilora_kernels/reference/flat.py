"""How twins cut out of flat arrays what their kernels would touch."""

import numpy as np


def span(x, at, n):
    """n numbers from x[at] on."""
    return x[at : at + n]


def grid(x, at, stride, rows, columns):
    """Rows of a flat array as a view [rows, columns]."""
    return np.lib.stride_tricks.as_strided(x[at:], (rows, columns), (stride * x.itemsize, x.itemsize))
