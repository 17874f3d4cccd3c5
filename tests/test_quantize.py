"""Weights to groups of integers: what is too small or too large for scales in float16."""

import numpy as np
import pytest

from minilora_kernels.floats import check_largest
from minilora_kernels.formats import FLOAT16
from minilora_kernels.quantize import quantize
from minilora_kernels.quantized import dequantize

BITS = [4, 8]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("size", [3e-5, 1e-6, 3e-7])
def test_small_weights_are_not_cut_off(bits, group, size):
    """Scales and minima are multiples of 2^-24: each weight is off by one step of its scale at most, and half of one of
    the minimum's."""
    weight = np.random.default_rng(0).standard_normal((16, 256), np.float32) * np.float32(size)
    matrix = quantize(weight, bits, group)
    steps = np.repeat(matrix.scales.astype(np.float32), group, axis=1)
    assert (np.abs(dequantize(matrix) - weight) < steps + 2**-25).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("large", [7e4, -1e19, 3e38])
def test_weights_that_are_too_large_are_refused(bits, large):
    weight = np.ones((16, 256), np.float32)
    weight[3, 5] = large
    with pytest.raises(OverflowError, match="float16 ends at 65504"):
        quantize(weight, bits, 32)


def test_one_that_is_no_number_hides_no_large_one():
    with pytest.raises(OverflowError, match="numbers up to 1e\\+09"):
        check_largest(np.array([1, np.nan, 1e9], np.float32), FLOAT16)


def test_forms_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="not to 5"):
        quantize(np.ones((16, 256), np.float32), 5, 32)
