"""Attention: what int8 pages must not lose and must not hide, what scratch it needs, which keys it asks for."""

import numpy as np
import pytest

from minilora_kernels import reference
from minilora_kernels.attention_int8 import LATE, first_keys, late_values
from minilora_kernels.attention_span import Span, keys_beside
from minilora_kernels.cases import CASES
from minilora_kernels.jit import kernel, program
from minilora_kernels.pages import KV_INT8, NOBODY, RUN, SPLIT, SUBPAGE, Query, advance, empty_pool
from minilora_kernels.prefetching import Prefetch
from minilora_kernels.wide import LARGEST, make_to_wide

[INT8] = [case for case in CASES if case.name == "attend int8"]
SIZE = {"position": 300, "tokens": 2, "heads": 1, "group": 3, "size": 64}


def test_wide_integers_are_the_rounded_numbers():
    to_wide = program(make_to_wide(minus=True), ("minus",))
    row = np.random.default_rng(1).standard_normal(112, dtype=np.float32)
    row[40:44] = 3.5, -3.5, 0, 1e-9
    before = row.copy()
    to_wide(row, 0, 16, 96, 48, np.abs(row[16:96]).max(), Prefetch(np.zeros(640, np.uint8), 0, 128))
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


@pytest.mark.parametrize(("bad", "given"), [(np.nan, np.nan), (np.inf, np.nan), (-np.inf, 0)])
def test_scores_that_are_not_finite(bad, given):
    """All scores of the first two splits are so: they spread, or have no weight if they are -inf."""
    [case] = [case for case in CASES if case.name == "attend float32"]
    kv, query, pages, nobody, q, q_at, stride, out, *rest = case.make(
        np.random.default_rng(1), {**SIZE, "position": 600}
    )
    kv.numbers[:], q[:], key = 1, 1, np.zeros(kv.size, np.float32)
    key[0] = bad
    for t in range(2 * SPLIT):
        reference.write_key(kv, query.layer, pages[t // kv.page], t % kv.page, query.head, key, 0)
    case.compiled(kv, query, pages, nobody, q, q_at, stride, out, *rest)
    # All values are 1, and so is their mean over the positions that have weight.
    assert np.allclose(out, 1 + given, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
def test_what_lies_behind_a_text_does_not_matter(kind):
    """The rest of its last page may hold what is no number, of a text that was there before."""
    [case] = [case for case in CASES if case.name == f"attend {kind}"]
    kv, query, pages, _, _, _, _, out, *_ = arguments = case.make(np.random.default_rng(1), SIZE)
    case.compiled(*arguments)
    expected, (page, end) = out.copy(), divmod(query.position + query.tokens, kv.page)
    with np.errstate(invalid="ignore"):
        for slot in range(end, kv.page):
            for write in (reference.write_key, reference.write_value):
                write(kv, query.layer, pages[page], slot, query.head, np.full(kv.size, np.nan, np.float32), 0)
    case.compiled(*arguments)
    assert np.array_equal(out, expected) and np.isfinite(out).all()


@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
def test_scratch_suffices_and_what_is_in_it_does_not_matter(kind):
    for name, size in (
        ("attend", {"position": 250, "tokens": 9, "heads": 1, "group": 3, "size": 80}),
        ("attend_part", {"position": 300, "heads": 3, "group": 13, "size": 48, "low": 0, "high": 6}),
    ):
        case = next(case for case in CASES if case.name == f"{name} {kind}")
        *arguments, scratch, _ = case.make(np.random.default_rng(1), size)
        result = arguments[7 if name == "attend" else 8]
        found = []
        for content in (-1, np.nan):
            guarded = np.full(len(scratch) + 64, content, np.float32)
            guarded[-64:] = 7
            case.compiled(*arguments, guarded, 0)
            assert (guarded[-64:] == 7).all()
            found.append(result.copy())
        assert np.isfinite(found[1]).all() and np.array_equal(*found)


@kernel
def _walk(kv, span, columns, skipped, asked, out):
    n = 0
    for d in range(0, kv.size, columns):
        cursor = keys_beside(kv, span, skipped, d // columns * asked)
        for _ in range(span.first, span.end, SUBPAGE):
            out[n], out[n + 1], out[n + 2], out[n + 3] = cursor
            cursor, n = advance(kv, cursor, asked), n + 4


@pytest.mark.parametrize("page", [32, 96])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("size", "columns"), [(64, 32), (64, 64), (128, 32), (96, 32), (80, 16), (80, 64), (96, 64)])
def test_keys_are_asked_for_once_and_in_order(size, columns, late, page):
    skipped, step = (LATE, columns * 5 // 8) if late else (0, columns)
    kv = empty_pool(KV_INT8, 1, 1, 1, size, page)
    span = Span(NOBODY, np.zeros(1, np.int64), 288, 480, NOBODY, 512)
    out = np.zeros(4 * 6 * -(-size // columns), np.int64)
    program(_walk)(kv, span, columns, skipped, step, out)
    asked = [divmod(d // columns * step * 6 + i * step, size) for d in range(0, size, columns) for i in range(6)]
    places = [(512 + (skipped + subpage) * SUBPAGE, column) for subpage, column in asked]
    expected = [[position, *divmod(position, page), column] for position, column in places]
    assert out.reshape(-1, 4).tolist() == expected
    assert asked == sorted(set(asked))


@kernel
def _late(kv, span, rows, out):
    for r in range(len(out)):
        for kind, ask in enumerate((late_values(kv, span, rows, r), first_keys(kv, span, rows, r))):
            out[r, kind, 0], out[r, kind, 1] = ask.at, ask.each


def test_late_values_and_the_first_keys_are_asked_for_beside_rows():
    size, page = 64, 96
    kv = empty_pool(KV_INT8, 2 * RUN, 1, 1, size, page)
    pages, following = np.array([7, 9, 2, 4, 11, 5, 6]), Query(0, 0, 1, 0, 560, 0, 0)
    numbers = np.arange(len(kv.numbers)).reshape(2, 2, RUN, page, size)

    def asked(first, end, rows):
        span = Span(following, pages, first, end, following, 512)
        program(_late)(kv, span, rows, out := np.zeros((LATE + 2, 2, 2), np.int64))
        return [[ask for ask in asks.tolist() if ask[1]] for asks in (out[:, 0], out[:, 1])]

    def places(kind, *positions):
        runs = [divmod(int(pages[position // page]), RUN) for position in positions]
        each = SUBPAGE * size * 16 // SPLIT
        return [[numbers[run, kind, n, p % page, 0], each] for (run, n), p in zip(runs, positions, strict=True)]

    # Beyond position 560 there are no keys.
    assert asked(288, 480, 3) == [places(1, 384, 416, 448), places(0, 512, 544)]
    assert asked(480, 500, 9) == [places(1, 480), places(0, 512, 544)]
    assert asked(288, 480, LATE - 1) == [[], []]
