"""Every kernel against its NumPy twin, on every row of CASES."""

import numpy as np
import pytest

from minilora_kernels import quantize_rows, reference, sample
from minilora_kernels.cases import CASES, empty_rows
from minilora_kernels.formats import FORMATS
from minilora_kernels.jit import program
from minilora_kernels.pack import pack_quantized
from minilora_kernels.quantized import Quantized


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_twin(case):
    for i, size in enumerate(case.small):
        difference = case.compare(np.random.default_rng(i), size)
        assert difference <= case.tolerance, f"{case.name} {size}: {difference}"


@pytest.mark.parametrize("count", [15, 20, 33])
@pytest.mark.parametrize("lowest", [False, True])
@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if not fmt.is_float], ids=lambda fmt: fmt.name)
def test_the_largest_integers_do_not_overflow(fmt, lowest, count):
    """All weights at one end of their range and all activations at +-127, in every tile: sums are as large as can be."""
    [case] = [case for case in CASES if case.name == f"linear {fmt.name}"]
    levels = np.full((32, 256), 0 if lowest else 2**fmt.bits - 1, np.uint8)
    scales = np.full((32, 2), 1 if fmt.is_nested else 0.01, np.int8 if fmt.is_nested else np.float16)
    units = np.full((32, 1, 1 + fmt.has_minimum), 0.01, np.float16) if fmt.is_nested else None
    packed = pack_quantized(Quantized(levels, scales, -scales if fmt.has_minimum else None, fmt.bits, units))
    size = {"N": 32, "K": 256, "M": count, "group": 128}
    arguments = (packed, *case.make(np.random.default_rng(0), size)[1:])
    rows = arguments[3]
    for r in range(count):
        reference.quantize_row(np.full(256, (-1.0) ** r, np.float32), 0, 256, 128, rows, r, 0)
    assert (np.abs(rows.q[: count * rows.stride].reshape(count, -1)[:, :256]) == 127).all()
    mine, theirs = np.zeros(count * 32, np.float32), np.zeros(count * 32, np.float32)
    case.compiled(*arguments[:8], mine, *arguments[9:])
    case.twin(*arguments[:8], theirs, *arguments[9:])
    assert np.allclose(mine, theirs, rtol=1e-5) and np.abs(theirs).min() > 1


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [70, 135, 170])
@pytest.mark.parametrize("kernel", [quantize_rows.quantize_row, quantize_rows.quantize_row_finely])
def test_a_group_with_a_number_that_is_not_finite_is_marked(kernel, place, bad):
    """And no other: integers would hide it. Four groups at a time, one by one, and the last half of one."""
    x, rows = np.ones(176, np.float32), empty_rows(1, 192)
    x[place] = bad
    program(kernel, (kernel is quantize_rows.quantize_row,))(x, 0, 176, 32, rows, 0, 0)
    marked = [g == place // 32 for g in range(len(rows.scales))]
    assert np.isnan(rows.scales).tolist() == np.isnan(rows.offsets).tolist() == marked


@pytest.mark.parametrize("places", [[0], [1023], [1024, 2000], [2047]])
def test_a_number_that_is_none_is_the_best(places):
    """As NumPy has it, so that it is seen: by comparing alone it would be passed over."""
    x = np.random.default_rng(3).standard_normal(2048, dtype=np.float32)
    x[places] = np.nan
    assert program(sample.argmax)(x, 0, 2048) == np.argmax(x) == places[0]
    x[:] = -np.inf
    assert program(sample.argmax)(x, 0, 2048) == 0


def test_of_equal_logits_the_first_are_the_best():
    x, ids, values = np.arange(2048, dtype=np.float32) % 2, np.zeros(5, np.int64), np.zeros(5, np.float32)
    program(sample.top)(x, 0, 2048, 5, ids, values, 0)
    assert program(sample.argmax)(x, 0, 2048) == 1 and ids.tolist() == [1, 3, 5, 7, 9]


@pytest.mark.parametrize(("top_k", "top_p", "kept"), [(0, 1, 32), (5, 1, 5), (0, 0.25, 8), (16, 0.25, 4)])
def test_of_equal_logits_the_first_are_kept_and_have_equal_chances(top_k, top_p, kept):
    """Draws from all of [0, 1), its ends included."""
    [case] = [case for case in CASES if case.name == "sample"]
    x, weights, ids = np.zeros(64, np.float32), np.zeros(64, np.float32), np.zeros(64, np.int64)
    x[::2] = -np.inf
    for draw in [*np.linspace(0, 1, 97, endpoint=False), np.nextafter(1, 0)]:
        cuts = top_k, np.float32(top_p), np.float32(0)
        assert case.compiled(x, 0, 64, np.float32(1), *cuts, draw, weights, ids, 0) == 2 * int(draw * kept) + 1
