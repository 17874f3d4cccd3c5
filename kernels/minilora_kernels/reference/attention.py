"""Twins of attention, and of what writes its pages."""

import numpy as np

from ..pages import KV, RUN, SPLIT, SUBPAGE, Query
from .flat import grid, span

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
    v = span(x, at, kv.size)
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


def attend(kv, query: Query, pages, following, q, q_at, q_stride, out, out_at, out_stride, scratch, scratch_at):
    """out = softmax(q . keys / sqrt(size)) . values, over the positions up to each token's own."""
    last = query.position + query.tokens
    keys, values = _tokens(kv, query.layer, query.head, pages, query.pages_at, last)
    for t in range(query.tokens):
        end = query.position + t + 1
        first = max(0, end - query.window) if query.window else 0
        heads = grid(q, q_at + t * q_stride, kv.size, query.group, kv.size)
        scores = heads @ keys[first:end].T / np.sqrt(np.float32(kv.size))
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        grid(out, out_at + t * out_stride, kv.size, query.group, kv.size)[:] = weights @ values[first:end]


def attend_part(kv, query: Query, pages, heads, low, high, q, q_at, parts, parts_at, scratch, scratch_at):
    """Items low .. high, heads of splits, of one token: each row's sums, maximum and total."""
    last, splits, width = query.position + 1, query.position // SPLIT + 1, kv.size + 2
    seen = max(0, last - query.window) if query.window else 0
    for item in range(low, high):
        split, head = divmod(item, heads)
        keys, values = _tokens(kv, query.layer, head, pages, query.pages_at, last)
        first, end = max(seen, split * SPLIT), min(last, split * SPLIT + SPLIT)
        for r in range(query.group):
            row = span(q, q_at + (head * query.group + r) * kv.size, kv.size)
            scores = keys[first:end] @ row / np.sqrt(np.float32(kv.size))
            maximum = scores.max(initial=-np.inf)
            weights = np.exp(scores - maximum)
            at = parts_at + ((head * splits + split) * query.group + r) * width
            parts[at : at + width] = np.concatenate([weights @ values[first:end], [maximum, weights.sum()]])


def merge_parts(parts, parts_at, splits, rows, row, size, out, out_at):
    """Merge `splits` results of attend_part."""
    found = (
        parts[parts_at : parts_at + splits * rows * (size + 2)]
        .reshape(splits, rows, size + 2)[:, row]
        .astype(np.float64)
    )
    weight = np.exp(found[:, size] - found[:, size].max())
    out[out_at : out_at + size] = weight @ found[:, :size] / (weight @ found[:, size + 1])
