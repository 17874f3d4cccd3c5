"""The NumPy twin of every public kernel: same name, same signature, slow and obvious.

Arrays are flat, as in the kernels; each twin first cuts out what its kernel would touch.
"""

import numpy as np

from .dot import PAIRS
from .pack import BLOCK, COLUMNS, FLOAT16, FLOAT32, FORMAT, GROUP, INT8, PANEL, is_float, unpack, unpack_quantized, zero
from .pages import KV, RUN, SPLIT, SUBPAGE, Query

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _span(x, at, n):
    return x[at : at + n]


def _grid(x, at, stride, rows, columns):
    """Rows of a flat array as a view [rows, columns]."""
    return np.lib.stride_tricks.as_strided(x[at:], (rows, columns), (stride * x.itemsize, x.itemsize))


# ---------------------------------------------------------------- linear


def linear(weights, matrices, matrix, x, x_row, rows, block0, block1, out, out_at, out_stride, add):
    """out[r, c] (+)= sum over k of x[x_row + r, k] * weight[32 * block0 + c, k]."""
    row = matrices[matrix]
    columns, group = int(row[COLUMNS]), int(row[GROUP])
    chosen = slice(block0 * BLOCK, block1 * BLOCK)
    if is_float(row[FORMAT]):
        values = _grid(x.values, x_row * x.stride, x.stride, rows, columns)
        y = values.astype(np.float64) @ unpack(weights, row)[chosen].T.astype(np.float64)
    else:
        y = _grouped_product(unpack_quantized(weights, row), x, x_row, rows, columns, group, chosen)
    target = _grid(out, out_at, out_stride, rows, y.shape[1])
    target[:] = target + y if add else y


def _grouped_product(matrix, x, x_row, rows, columns, group, chosen):
    """Sum over groups of scale * x_scale * (integer dot) + minimum * x_scale * (sum of q)."""
    q = _grid(x.q, x_row * x.stride, x.stride, rows, columns).astype(np.int64).reshape(rows, -1, group)
    x_scale = _grid(x.scales, x_row * (x.stride // 32), x.stride // 32, rows, columns // group).astype(np.float64)
    u = matrix.values[chosen].astype(np.int64).reshape(-1, columns // group, group) - zero(matrix.format)
    dots = np.einsum("mgk,ngk->mng", q, u)
    y = np.einsum("mng,ng,mg->mn", dots, matrix.scales[chosen].astype(np.float64), x_scale)
    if matrix.minima is not None:
        y += np.einsum("mg,ng->mn", x_scale * q.sum(axis=2), matrix.minima[chosen].astype(np.float64))
    return y


# ---------------------------------------------------------------- pointwise


def rms_norm(x, at, n, weights, weight_at, eps, out, out_at):
    """out[i] = x[i] / sqrt(mean(x^2) + eps) * weight[i]."""
    v = _span(x, at, n).astype(np.float64)
    weight = _span(weights, weight_at, 4 * n).view(np.float32)
    out[out_at : out_at + n] = v / np.sqrt(np.mean(v * v) + eps) * weight


def quantize_row(x, at, n, group, rows, row, column):
    """q = round(x / scale), scale = max |x| / 127 in each group, NaN where a number is not finite."""
    v = _span(x, at, n).reshape(-1, group)
    finite = np.isfinite(v).all(axis=1, keepdims=True)
    v = np.where(finite, v, np.float32(0))
    scale = np.where(finite, np.abs(v).max(axis=1, keepdims=True) / np.float32(127), np.float32(np.nan))
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    q = np.rint(v * inverse).astype(np.int32)
    to, scale_to = row * rows.stride + column, row * (rows.stride // 32) + column // group
    groups = slice(scale_to, scale_to + n // group)
    rows.q[to : to + n] = q.reshape(-1)
    rows.scales[groups] = scale[:, 0]
    rows.sums[groups] = -q.sum(axis=1)
    rows.offsets[groups] = rows.scales[groups] * q.sum(axis=1).astype(np.float32)


def narrow(x, n, out, at):
    """out[at + i] = float16(x[i]); returns max |x|."""
    out[at : at + n] = x[:n].astype(np.float16).view(np.uint16)
    return np.abs(x[:n]).max()


def widen(x, n, out):
    """out[i] = float32(x[i])."""
    out[:n] = x[:n].view(np.float16)


def quantize_panels(x, panels, inner, words, out, at):
    """scale[i] = max over k of |x[k, i]| / 127, q[k, i] = round(x[k, i] / scale[i]) in each panel [inner][16]."""
    v = _span(x, 0, panels * inner * PANEL).reshape(panels, inner, PANEL)
    scales = np.maximum(np.abs(v).max(axis=1), np.float32(1e-30)) / np.float32(127)
    q = np.rint(v / scales[:, None]).astype(np.int8)
    raw = out[at : at + panels * (64 + inner * PANEL)].reshape(panels, -1)
    if words:
        q = (q.reshape(panels, inner // 4, 4, PANEL).transpose(0, 1, 3, 2) + np.int16(128)).astype(np.uint8)
    raw[:, :64], raw[:, 64:] = scales.view(np.uint8), q.reshape(panels, -1).view(np.uint8)


def silu_mul(gate_up, at, panels, out, out_at):
    """out = gate * sigmoid(gate) * up, 16 values of gate and 16 of up in turn."""
    gate, up = np.moveaxis(_span(gate_up, at, 32 * panels).reshape(panels, 2, PANEL), 1, 0).astype(np.float64)
    out[out_at : out_at + 16 * panels] = (gate / (1 + np.exp(-gate)) * up).reshape(-1)


def add_row(x, at, weights, weight_at, n):
    """x[i] += weight[i]."""
    x[at : at + n] += _span(weights, weight_at, 4 * n).view(np.float32)


def rope(x, at, half, cos, sin, table_at):
    """(a, b) -> (a cos - b sin, b cos + a sin) for a = x[i], b = x[half + i]."""
    a, b = x[at : at + half].copy(), x[at + half : at + 2 * half].copy()
    c, s = _span(cos, table_at, half), _span(sin, table_at, half)
    x[at : at + half], x[at + half : at + 2 * half] = a * c - b * s, b * c + a * s


def embed(weights, matrices, matrix, token, out, out_at):
    """out = row `token` of a packed matrix."""
    row = matrices[matrix]
    out[out_at : out_at + row[COLUMNS]] = unpack(weights, row)[token]


# ---------------------------------------------------------------- attention


KEYS, VALUES = range(2)


def _pages(kv: KV, array, kind, pages, layer, head, *shape):
    """The keys or values of one layer and head of some pages: a view for one page, a copy for an array of them."""
    return array.reshape(-1, kv.layers, kv.heads, 2, RUN, *shape)[pages // RUN, layer, head, kind, pages % RUN]


def _tokens(kv: KV, layer, head, pages, pages_at, count):
    """Keys and values [count, size] of a sequence's first tokens, as float32."""
    table = pages[pages_at : pages_at + -(-count // kv.page)]
    k, v = (x.reshape(-1, kv.size)[:count] for x in (_keys(kv, table, layer, head), _values(kv, table, layer, head)))
    if kv.numbers.dtype == np.uint16:
        return k.view(np.float16).astype(np.float32), v.view(np.float16).astype(np.float32)
    if _has_scales(kv):
        scales = (
            _pages(kv, kv.scales, kind, table, layer, head, kv.page).reshape(-1)[:count, None]
            for kind in (KEYS, VALUES)
        )
        return tuple(x * s for x, s in zip((k - np.float32(128), v), scales, strict=True))
    return k, v


def _keys(kv: KV, pages, layer, head):
    """Keys as they are stored, [..., subpages, 32, size]."""
    subpages = kv.page // SUBPAGE
    if _has_scales(kv):
        fours = _pages(kv, kv.numbers, KEYS, pages, layer, head, subpages, kv.size // 4, SUBPAGE, 4)
        return np.swapaxes(fours, -3, -2).reshape(*fours.shape[:-3], SUBPAGE, kv.size)
    return np.swapaxes(_pages(kv, kv.numbers, KEYS, pages, layer, head, subpages, kv.size, SUBPAGE), -2, -1)


def _values(kv: KV, pages, layer, head):
    """Values as they are stored, [..., page, size]."""
    if _has_scales(kv):
        fours = _pages(kv, kv.numbers.view(np.int8), VALUES, pages, layer, head, kv.page // 4, kv.size, 4)
        return np.swapaxes(fours, -2, -1).reshape(*fours.shape[:-3], kv.page, kv.size)
    return _pages(kv, kv.numbers, VALUES, pages, layer, head, kv.page, kv.size)


def _stored(kv: KV, scales, x, at):
    """x as the pool stores it, its scale noted."""
    v = _span(x, at, kv.size)
    if kv.numbers.dtype == np.uint16:
        return np.clip(v, -65504, 65504).astype(np.float16).view(np.uint16)
    if _has_scales(kv):
        scale = np.abs(v).max() / np.float32(127)
        scales[:] = scale
        return np.rint(v * (np.float32(1) / scale if np.finfo(np.float32).tiny <= scale < np.inf else 0)).astype(
            np.int8
        )
    return v


def _scale(kv: KV, kind, page, layer, head, slot):
    """Where a token's scale is kept, if it has one."""
    return _pages(kv, kv.scales, kind, page, layer, head, kv.page)[slot : slot + 1] if _has_scales(kv) else kv.scales


def write_key(kv, layer, page, slot, head, x, at):
    """Store a token's key of one kv head."""
    key = _stored(kv, _scale(kv, KEYS, page, layer, head, slot), x, at)
    if _has_scales(kv):
        keys = _pages(kv, kv.numbers, KEYS, page, layer, head, kv.page // SUBPAGE, kv.size // 4, SUBPAGE, 4)
        keys[slot // SUBPAGE, :, slot % SUBPAGE] = (key + np.int16(128)).reshape(-1, 4)
    else:
        keys = _pages(kv, kv.numbers, KEYS, page, layer, head, kv.page // SUBPAGE, kv.size, SUBPAGE)
        keys[slot // SUBPAGE, :, slot % SUBPAGE] = key


def write_value(kv, layer, page, slot, head, x, at):
    """Store a token's value of one kv head."""
    value = _stored(kv, _scale(kv, VALUES, page, layer, head, slot), x, at)
    if _has_scales(kv):
        values = _pages(kv, kv.numbers.view(np.int8), VALUES, page, layer, head, kv.page // 4, kv.size, 4)
        values[slot // 4, :, slot % 4] = value
    else:
        _pages(kv, kv.numbers, VALUES, page, layer, head, kv.page, kv.size)[slot] = value


def _has_scales(kv: KV) -> bool:
    return kv.numbers.dtype == np.uint8


def _asked(query: Query, following: Query, then, last):
    """Up to which position of `following` keys are asked for, from split `then` on, beside a split that ends at `last`."""
    first = _first_seen(query, (last - 1) // SPLIT)
    return _first_seen(following, then) + max(0, -(-(last - first) // SUBPAGE) * SUBPAGE)


def _first_seen(query: Query, split):
    before = max(0, query.position - query.window + 1) // SUBPAGE * SUBPAGE if query.window else 0
    return max(split * SPLIT, before)


def attend(kv, query: Query, pages, asked, following, q, q_at, q_stride, out, out_at, out_stride, scratch, scratch_at):
    """out = softmax(q . keys / sqrt(size)) . values, over the positions up to each token's own."""
    last = query.position + query.tokens
    keys, values = _tokens(kv, query.layer, query.head, pages, query.pages_at, last)
    for t in range(query.tokens):
        end = query.position + t + 1
        first = max(0, end - query.window) if query.window else 0
        heads = _grid(q, q_at + t * q_stride, kv.size, query.group, kv.size)
        scores = heads @ keys[first:end].T / np.sqrt(np.float32(kv.size))
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        _grid(out, out_at + t * out_stride, kv.size, query.group, kv.size)[:] = weights @ values[first:end]
    return _asked(query, following, 0, last)


def attend_part(
    kv, query: Query, pages, split, asked, following, then, q, q_at, q_stride, parts, parts_at, scratch, scratch_at
):
    """One split of positions, not merged: each row's sums, maximum and total."""
    keys, values = _tokens(kv, query.layer, query.head, pages, query.pages_at, query.position + query.tokens)
    rows, width = query.tokens * query.group, kv.size + 2
    for r in range(rows):
        t, g = divmod(r, query.group)
        end = query.position + t + 1
        first = max(0, end - query.window) if query.window else 0
        chosen = slice(max(first, split * SPLIT), max(first, min(end, split * SPLIT + SPLIT)))
        row = _span(q, q_at + t * q_stride + g * kv.size, kv.size)
        scores = keys[chosen] @ row / np.sqrt(np.float32(kv.size))
        maximum = scores.max(initial=-np.inf)
        weights = np.exp(scores - maximum)
        found = np.concatenate([weights @ values[chosen], [maximum, weights.sum()]])
        parts[parts_at + r * width : parts_at + (r + 1) * width] = found
    return _asked(query, following, then, min(split * SPLIT + SPLIT, query.position + query.tokens))


def merge_parts(parts, parts_at, splits, rows, row, size, out, out_at):
    """Merge `splits` results of attend_part."""
    found = (
        parts[parts_at : parts_at + splits * rows * (size + 2)]
        .reshape(splits, rows, size + 2)[:, row]
        .astype(np.float64)
    )
    weight = np.exp(found[:, size] - found[:, size].max())
    out[out_at : out_at + size] = weight @ found[:, :size] / (weight @ found[:, size + 1])


# ---------------------------------------------------------------- LoRA


def _panels(arena, at, panels, inner, fmt, words=False):
    """Panels [panels, inner, 16] at byte `at`, as float32; words: int8 numbers are stored as [inner / 4][16][4], plus 128."""
    if fmt == INT8:
        raw = arena[at : at + panels * (64 + inner * PANEL)].reshape(panels, -1)
        scales = np.ascontiguousarray(raw[:, :64]).view(np.float32)
        if words:
            numbers = raw[:, 64:].reshape(panels, inner // 4, PANEL, 4).transpose(0, 1, 3, 2).astype(np.float32) - 128
        else:
            numbers = raw[:, 64:].view(np.int8)
        return scales[:, None] * numbers.reshape(panels, inner, PANEL)
    dtype = np.dtype({FLOAT32: np.float32, FLOAT16: np.float16}[fmt])
    count = panels * inner * PANEL
    return arena[at : at + count * dtype.itemsize].view(dtype).astype(np.float32).reshape(panels, inner, PANEL)


def to_wide(numbers):
    """Numbers [rows, 16 n] as wide.store_sixteen leaves them, float32 of the same shape."""
    panels = np.asarray(numbers, np.float32).reshape(-1, PANEL)
    scale = np.abs(panels).max(axis=1) / np.float32(127 * 128)
    v = np.rint(np.divide(panels, scale[:, None], out=np.zeros_like(panels), where=scale[:, None] > 0)).astype(np.int32)
    out = np.zeros_like(panels)
    out[:, :8] = wide_words(v)
    out[:, 8] = scale
    out[:, 9:13] = (-v).reshape(-1, 4, 4).sum(axis=2, dtype=np.int32).view(np.float32)
    return out.reshape(numbers.shape)


def from_wide(words):
    """The numbers for which store_sixteen's words stand, of the same shape."""
    panels = words.reshape(-1, PANEL)
    return (wide_integers(panels[:, :8]) * panels[:, 8:9]).astype(np.float32).reshape(words.shape)


def wide_words(v):
    """Integers [rows, 16] as words, float32 [rows, 8]."""
    if PAIRS:
        parts = [v[:, i::2].astype(np.int16) for i in (0, 1)]
    else:
        parts = [(v >> 7).astype(np.int8), (v & 127).astype(np.int8)]
    return np.hstack([np.ascontiguousarray(part).view(np.float32) for part in parts])


def wide_integers(words):
    """The integers of words, int64 [rows, 16]."""
    dtype = np.int16 if PAIRS else np.int8
    first, second = (np.ascontiguousarray(words[:, i : i + 4]).view(dtype).astype(np.int64) for i in (0, 4))
    return np.stack([first, second], axis=2).reshape(-1, 16) if PAIRS else 128 * first + second


def make_lora(fmt):
    """(shrink, gather, expand) for adapters stored as FLOAT32, FLOAT16 or INT8."""
    leave = to_wide if fmt == INT8 else lambda numbers: numbers

    def shrink(arena, at, following, columns, panel, x, x_at, x_stride, rows, scale, s, s_at, s_stride):
        a = _panels(arena, at, panel + 1, columns, fmt)[panel]
        product = scale * (_grid(x, x_at, x_stride, rows, columns) @ a)
        _grid(s, s_at + panel * PANEL, s_stride, rows, PANEL)[:] = leave(product)

    def gather(arena, at, columns, panels, token, scale, s, s_at):
        numbers = scale * _panels(arena, at, panels, columns, fmt)[:, token]
        s[s_at : s_at + panels * PANEL] = leave(numbers).reshape(-1)

    def expand(
        arena, at, rank, panel0, panel1, following, s, s_at, column, s_stride, rows, out, out_at, out_stride, panel_step
    ):
        b, whole = _panels(arena, at, panel1, rank, fmt, words=True), -(-(column + rank) // PANEL) * PANEL
        shrunk = _grid(s, s_at, s_stride, rows, whole)
        shrunk = (from_wide(shrunk) if fmt == INT8 else shrunk)[:, column : column + rank]
        for p in range(panel0, panel1):
            _grid(out, out_at + (p - panel0) * panel_step, out_stride, rows, PANEL)[:] += shrunk @ b[p]

    return shrink, gather, expand


# ---------------------------------------------------------------- sampling


def argmax(x, at, n):
    """The index of the largest x[i], the first of equals."""
    return int(np.argmax(_span(x, at, n)))


def log_sum_exp(x, at, n):
    """log(sum of exp(x[i]))."""
    v = _span(x, at, n).astype(np.float64)
    return v.max() + np.log(np.exp(v - v.max()).sum())


def rank(x, at, n, token):
    """1 + the number of logits greater than x[token]."""
    return int((_span(x, at, n) > x[at + token]).sum()) + 1


def top(x, at, n, count, ids, values, to):
    """The `count` largest, falling, the first of equals first."""
    order = np.argsort(-_span(x, at, n), kind="stable")[:count]
    ids[to : to + count], values[to : to + count] = order, x[at + order]


def uniform(seed, position):
    """A number in [0, 1) from (seed, position): two rounds of SplitMix64."""
    with np.errstate(over="ignore"):
        state = np.uint64(seed)
        for word in (np.uint64(0), np.uint64(position)):
            state = (state ^ word) + GOLDEN
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return float(state >> np.uint64(11)) / (1 << 53)


def sample(x, at, n, temperature, top_k, top_p, min_p, draw, weights, ids, to):
    """A token drawn from softmax(x / temperature), cut by min_p, then top_k, then top_p."""
    v = _span(x, at, n).astype(np.float64)
    if not np.isfinite(v.max()):
        return int(np.argmax(~(v < np.inf)))
    w = np.exp((v - v.max()) / temperature)
    if top_k == 0 and top_p >= 1 and min_p <= 0:
        return int(np.searchsorted(np.cumsum(w), draw * w.sum(), side="right"))
    order = np.argsort(-w, kind="stable")
    order = order[w[order] >= min_p][: top_k or n]
    mass = np.cumsum(w[order])
    if top_p < 1:
        order = order[: np.searchsorted(mass, top_p * mass[-1]) + 1]
    order = np.sort(order)
    mass = np.cumsum(w[order])
    return int(order[min(np.searchsorted(mass, draw * mass[-1], side="right"), len(order) - 1)])


# ---------------------------------------------------------------- quantisation


def fit_ranges(weight, group, scales, minima):
    """The scale and minimum of each group with the least squared error among several narrowing ranges."""
    from .quantize import RANGES, SHRINK

    for g, w in enumerate(weight.reshape(-1, group).astype(np.float64)):
        low, high, best = w.min(), w.max(), np.inf
        scales[g], minima[g] = 0, low
        for r in range(RANGES if high > low else 0):
            cut = (high - low) * SHRINK * r
            level = np.rint(np.clip((w - low - cut / 2) / ((high - low - cut) / 15), 0, 15))
            scale, minimum = np.polyfit(level, w, 1) if np.ptp(level) else (0.0, w.mean())
            error = ((w - scale * level - minimum) ** 2).sum()
            if error < best:
                best, scales[g], minima[g] = error, scale, minimum


def dot4(acc, u, s):
    """acc[i] + sum over j < 4 of u[4 i + j] * s[4 i + j]: u uint8, s int8, acc int32."""
    return acc + (u.astype(np.int32) * s.astype(np.int32)).reshape(-1, 4).sum(axis=1, dtype=np.int32)


__all__ = [
    "add_row",
    "argmax",
    "attend",
    "attend_part",
    "dot4",
    "embed",
    "fit_ranges",
    "linear",
    "log_sum_exp",
    "make_lora",
    "merge_parts",
    "quantize_row",
    "rank",
    "rms_norm",
    "rope",
    "sample",
    "silu_mul",
    "top",
    "uniform",
    "write_key",
    "write_value",
]
