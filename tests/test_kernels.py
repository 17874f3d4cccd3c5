"""Every kernel against its NumPy twin, on every row of CASES."""

import numpy as np
import pytest

from minilora_kernels import pointwise
from minilora_kernels.cases import CASES, empty_rows
from minilora_kernels.jit import program


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_twin(case):
    for i, size in enumerate(case.small):
        difference = case.compare(np.random.default_rng(i), size)
        assert difference <= case.tolerance, f"{case.name} {size}: {difference}"


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_group_with_a_number_that_is_not_finite_is_marked(bad):
    """And no other: int8 would hide it."""
    x, rows = np.ones(128, np.float32), empty_rows(1, 128)
    x[70] = bad
    program(pointwise.quantize_row)(x, 0, 128, 32, rows, 0, 0)
    assert np.isnan(rows.scales).tolist() == np.isnan(rows.offsets).tolist() == [False, False, True, False]
