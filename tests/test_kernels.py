"""Every kernel against its NumPy twin, on every row of CASES."""

import numpy as np
import pytest

from minilora_kernels.cases import CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_twin(case):
    for i, size in enumerate(case.small):
        difference = case.compare(np.random.default_rng(i), size)
        assert difference <= case.tolerance, f"{case.name} {size}: {difference}"
