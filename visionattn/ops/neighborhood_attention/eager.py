"""Fast plain PyTorch: dense attention of small tiles of queries to the rectangle of keys that they reach.

A tile of T x T queries reaches (T + K - 1)^2 keys, so that a key is gathered a few times instead of K^2 times. What
lies outside of a query's window is masked in the bias; tiles differ in few patterns of it. Tiles go through in chunks
that stay in the cache, and the backward pass computes the attention again instead of keeping it.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from visionattn.ops._dispatch import exporting
from visionattn.ops._register import differentiable
from visionattn.ops.neighborhood_attention._tiles import Tiling, tiling
from visionattn.ops.neighborhood_attention._windows import Pair

CHUNK_BYTES = {"cpu": 4 * 2**20}  # logits, gathered keys and values of one chunk: it stays in the cache
CHUNK_BYTES_ELSEWHERE = 256 * 2**20


def why_not(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel_size: Pair, dilation: Pair, scale: float
) -> str | None:
    """Everything runs, but the loop over tiles cannot be exported."""
    return "its loop over tiles is opaque to exporters" if exporting() else None


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel_size: Pair, dilation: Pair, scale: float
) -> Tensor:
    """Attend tile by tile."""
    out: Tensor = _tiled(q, k, v, bias, kernel_size, dilation, scale)
    return out


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel_size: list[int], dilation: list[int], scale: float
) -> Tensor:
    """q, k, v ``(B, h, H, W, d)``; returns ``(B, h, H, W, dv)``."""
    B, h, H, W, _ = q.shape
    with torch.autocast(q.device.type, enabled=False):
        tiles, q_rows, k_rows, v_rows, patterns = _prepare(q, k, v, bias, kernel_size, dilation)
        T, dv = tiles.tile_queries, v.shape[-1]
        out = v_rows.new_empty(B * h, H * W, dv)
        for items, spans in _chunks(tiles, q_rows, v_rows):
            slots = out.new_empty(len(items) * len(tiles.pattern), T, dv)
            for span, rows in spans:
                queries, keys, values = _gather(tiles, items, span, q_rows, k_rows, v_rows)
                logits = patterns.index_select(0, _pattern_rows(tiles, items, span, h, bias))
                attn = logits.baddbmm_(queries, keys.transpose(1, 2), alpha=scale).softmax(dim=-1)
                torch.bmm(attn, values, out=slots[rows])
            slots = slots.view(len(items), -1, dv)
            out[items.start : items.stop] = slots.index_select(1, tiles.query_slot)
    return out.view(B, h, H, W, dv).to(v.dtype)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    dilation: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = q.shape[1]
    tiles, q_rows, k_rows, v_rows, patterns = _prepare(q, k, v, bias, kernel_size, dilation)
    dout_rows = _rows(dout, q_rows.dtype)
    dq, dk, dv = (torch.empty_like(x) for x in (q_rows, k_rows, v_rows))
    dpatterns = torch.zeros_like(patterns)
    for items, spans in _chunks(tiles, q_rows, v_rows):
        count = len(items) * len(tiles.pattern)
        dq_slots = dq.new_empty(count, tiles.tile_queries, dq.shape[-1])
        dk_slots = dk.new_empty(count, tiles.tile_keys, dk.shape[-1])
        dv_slots = dv.new_empty(count, tiles.tile_keys, dv.shape[-1])
        for span, rows in spans:
            queries, keys, values = _gather(tiles, items, span, q_rows, k_rows, v_rows)
            grads = _take(dout_rows, items, tiles.queries, span, tiles.tile_queries, tiles.is_query)
            pattern = _pattern_rows(tiles, items, span, h, bias)
            logits = patterns.index_select(0, pattern)
            attn = logits.baddbmm_(queries, keys.transpose(1, 2), alpha=scale).softmax(dim=-1)
            torch.bmm(attn.transpose(1, 2), grads, out=dv_slots[rows])
            dattn = torch.bmm(grads, values.transpose(1, 2), out=logits)
            dlogits = torch.ops.aten._softmax_backward_data(dattn, attn, -1, attn.dtype)
            if bias is not None:
                dpatterns.index_add_(0, pattern, dlogits)
            torch.bmm(dlogits, keys, out=dq_slots[rows])
            torch.bmm(dlogits.transpose(1, 2), queries, out=dk_slots[rows])
        at = slice(items.start, items.stop)
        dq[at] = dq_slots.view(len(items), -1, dq.shape[-1]).index_select(1, tiles.query_slot)
        dk[at] = _fold(tiles, dk_slots, len(items))
        dv[at] = _fold(tiles, dv_slots, len(items))
    dq, dk, dv = (dx.view_as(x).to(x.dtype) for dx, x in ((dq.mul_(scale), q), (dk.mul_(scale), k), (dv, v)))
    return dq, dk, dv, q.new_empty(0) if bias is None else _fold_bias(tiles, dpatterns, bias)


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel_size: list[int], dilation: list[int]
) -> tuple[Tiling, Tensor, Tensor, Tensor, Tensor]:
    """Return tiles, the maps as ``(B * h, N, d)`` and every pattern of bias and mask, ``(h or 1) * P`` times T x S."""
    (Kh, Kw), (dh, dw) = kernel_size, dilation
    tiles = tiling((q.shape[2], q.shape[3]), (Kh, Kw), (dh, dw), q.device)
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32  # sums stay in full precision
    table = torch.full((1 if bias is None else len(bias), 2 * Kh, 2 * Kw), -math.inf, dtype=exact, device=q.device)
    table[:, :-1, :-1] = 0.0 if bias is None else bias
    patterns = table.flatten(1).index_select(1, tiles.offsets.flatten())
    patterns = patterns.view(-1, tiles.tile_queries, tiles.tile_keys)
    return tiles, _rows(q, exact), _rows(k, exact), _rows(v, exact), patterns


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``(B, h, H, W, d)`` to contiguous ``(B * h, N, d)``."""
    return x.to(dtype).contiguous().flatten(2, 3).flatten(0, 1)


def _chunks(tiles: Tiling, q_rows: Tensor, v_rows: Tensor) -> Iterator[tuple[range, list[tuple[slice, slice]]]]:
    """Yield runs of maps, each with its chunks: which tiles, and which rows of (map, tile) these are within the run.

    A chunk is several whole maps, or a part of one.
    """
    count, width = len(tiles.pattern), q_rows.shape[-1] + v_rows.shape[-1]
    limit = CHUNK_BYTES.get(q_rows.device.type, CHUNK_BYTES_ELSEWHERE)
    per_tile = (tiles.tile_queries * tiles.tile_keys + tiles.tile_keys * width) * q_rows.element_size()
    step = max(1, limit // per_tile)
    maps = max(1, step // count)
    for start in range(0, len(q_rows), maps):
        items = range(start, min(start + maps, len(q_rows)))
        if step < count:
            parts = [slice(s, min(s + step, count)) for s in range(0, count, step)]
            yield items, [(s, s) for s in parts]
        else:
            yield items, [(slice(0, count), slice(0, len(items) * count))]


def _take(x: Tensor, items: range, index: Tensor, span: slice, width: int, keep: Tensor | None = None) -> Tensor:
    """Gather the tokens of a span of tiles of some maps: ``(maps * tiles, width, d)``."""
    at = slice(span.start * width, span.stop * width)
    y = x[items.start : items.stop].index_select(1, index[at])
    if keep is not None:
        y.mul_(keep[at])
    return y.view(-1, width, x.shape[-1])


def _gather(
    tiles: Tiling, items: range, span: slice, q_rows: Tensor, k_rows: Tensor, v_rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _take(q_rows, items, tiles.queries, span, tiles.tile_queries),
        _take(k_rows, items, tiles.keys, span, tiles.tile_keys),
        _take(v_rows, items, tiles.keys, span, tiles.tile_keys),
    )


def _pattern_rows(tiles: Tiling, items: range, span: slice, heads: int, bias: Tensor | None) -> Tensor:
    """Which pattern each (map, tile) of a chunk has; with a bias, every head has its own."""
    pattern = tiles.pattern[span]
    item = torch.arange(items.start, items.stop, device=pattern.device)[:, None]
    return (pattern + item % heads * (0 if bias is None else len(tiles.offsets))).flatten()


def _fold(tiles: Tiling, slots: Tensor, maps: int) -> Tensor:
    """Sum the gradients of all slots that hold a token: ``(maps * t, S, d)`` to ``(maps, N, d)``."""
    item = torch.arange(maps, device=slots.device)[:, None]
    index = (tiles.key_slots + item * (len(slots) // maps * tiles.tile_keys)).flatten()
    starts = (tiles.key_slot_starts + item * len(tiles.key_slots)).flatten()
    return F.embedding_bag(index, slots.flatten(0, 1), starts, mode="sum").view(maps, -1, slots.shape[-1])


def _fold_bias(tiles: Tiling, dpatterns: Tensor, bias: Tensor) -> Tensor:
    """Sum the gradients of all pattern entries that read an entry of the bias."""
    heads, rows, cols = bias.shape
    dpatterns = dpatterns.view(heads, -1)
    table = dpatterns.new_zeros(heads, (rows + 1) * (cols + 1))
    table.scatter_add_(1, tiles.offsets.flatten().expand(heads, -1), dpatterns)
    return table.view(heads, rows + 1, cols + 1)[:, :-1, :-1].to(bias.dtype, memory_format=torch.contiguous_format)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel_size: list[int], dilation: list[int], scale: float
) -> Tensor:
    return v.new_empty(v.shape)


# The loop is opaque to compilers: its trip count depends on the shape and must not be unrolled.
_tiled = differentiable("neighborhood_attention_tiled", _forward, _fake, _backward)
