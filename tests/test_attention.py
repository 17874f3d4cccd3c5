"""Attention over int8 pages: what its integers must not lose and must not hide."""

import numpy as np
import pytest

from minilora_kernels import reference
from minilora_kernels.cases import CASES
from minilora_kernels.jit import program
from minilora_kernels.wide import LARGEST, make_to_wide

[INT8] = [case for case in CASES if case.name == "attend int8"]
SIZE = {"position": 300, "tokens": 2, "heads": 1, "group": 3, "size": 64}


def test_wide_integers_are_the_rounded_numbers():
    to_wide = program(make_to_wide(minus=True), ("minus",))
    row = np.random.default_rng(1).standard_normal(112, dtype=np.float32)
    row[40:44] = 3.5, -3.5, 0, 1e-9
    before = row.copy()
    to_wide(row, 0, 16, 96, 48, np.abs(row[16:96]).max())
    scale = row[48]
    got = reference.wide_integers(row[8:48].reshape(5, 8)).reshape(-1)
    assert scale == np.abs(before[16:96]).max() / LARGEST and np.abs(got).max() == LARGEST
    assert np.abs(got * scale - before[16:96]).max() <= 0.501 * scale
    assert row[49:50].view(np.int32) == -got.sum()
    assert np.array_equal(row[:8], before[:8]) and np.array_equal(row[50:], before[50:]), "nothing else is written"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_a_number_that_is_not_finite_is_not_hidden(where, bad):
    kv, query, pages, nobody, q, q_at, stride, out, *rest = INT8.make(np.random.default_rng(1), SIZE)
    page, slot = pages[1], 7
    x = np.zeros(kv.size, np.float32)
    x[5] = bad
    if where == "query":
        q[stride + 3] = bad
    else:
        write = {"key": reference.write_key, "value": reference.write_value}[where]
        case = next(case for case in CASES if case.name == f"write_{where} int8")
        with np.errstate(invalid="ignore"):
            write(kv, query.layer, page, slot, query.head, x, 0)
        assert np.count_nonzero(~np.isfinite(kv.scales)) == 1
        kv.scales[~np.isfinite(kv.scales)] = 0
        case.compiled(kv, query.layer, page, slot, query.head, x, 0)
    INT8.compiled(kv, query, pages, nobody, q, q_at, stride, out, *rest)
    first, second = out[:stride], out[stride:]
    if where == "query":
        assert np.isfinite(first).all() and np.isnan(second[: kv.size]).all() and np.isfinite(second[kv.size :]).all()
    else:
        assert np.isnan(first).all() and np.isnan(second).all()


def test_numbers_too_small_for_a_scale_are_nothing():
    kv, query, pages, nobody, q, *rest = INT8.make(np.random.default_rng(1), SIZE)
    out = rest[2]
    q[:] = 1e-41
    kv.scales[:] = 1e-41
    INT8.compiled(kv, query, pages, nobody, q, *rest)
    assert np.isfinite(out).all() and np.abs(out).max() < 1e-36


def test_many_small_weights_keep_their_share():
    """With all weights equal the sum over all positions is the mean, to 14 bits and not to 7."""
    kv, query, pages, nobody, q, q_at, stride, out, *rest = INT8.make(np.random.default_rng(1), SIZE)
    q[:] = 0
    expected = out.copy()
    reference.attend(kv, query, pages, nobody, q, q_at, stride, expected, *rest)
    INT8.compiled(kv, query, pages, nobody, q, q_at, stride, out, *rest)
    assert np.abs(out - expected).max() < 1e-4 * np.abs(expected).max()
