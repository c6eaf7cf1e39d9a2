"""Fast plain PyTorch: attend in chunks of query regions, so that the gathered copy of K and V stays small.

Two ways, by shape. Where the routed regions cover a good part of the map and the map is small, one masked attention
over all tokens beats many tiny ones. Elsewhere the keys and values of a chunk of query regions are gathered, used and
dropped; the backward pass gathers them again instead of keeping them.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from visionattn.ops._crossovers import first_wins
from visionattn.ops._dispatch import exporting
from visionattn.ops._register import differentiable
from visionattn.ops.routed_attention._regions import to_map, to_regions

CHUNK_BYTES = 8 * 2**20  # gathered keys, values and logits of one chunk: about the size of a last-level cache
MASK_WINS = "routed_attention: regions for each routed one; mask, gather"  # masked, it does P / topk times the work


def why_not(q: Tensor, k: Tensor, v: Tensor, index: Tensor, grid: tuple[int, int], scale: float) -> str | None:
    """Everything runs, but the chunk loop cannot be exported."""
    return "its chunk loop is opaque to exporters" if exporting() else None


def forward(q: Tensor, k: Tensor, v: Tensor, index: Tensor, grid: tuple[int, int], scale: float) -> Tensor:
    """Attend by mask or by chunks, whichever suits the shape."""
    B, _, H, W, _ = q.shape
    P, topk = index.shape[1:]
    mask_bytes = B * (H * W) ** 2 * q.element_size()
    q, k, v = (to_regions(x, grid) for x in (q, k, v))  # (B, h, P, T, d)
    if topk == P:  # every region is routed to: plain attention
        q, k, v = (x.flatten(2, 3) for x in (q, k, v))  # (B, h, P * T, d)
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    elif first_wins(MASK_WINS, P / topk, q) and mask_bytes <= CHUNK_BYTES:
        out = _masked(q, k, v, index, scale)
    else:
        out = _chunked(q.contiguous(), k.contiguous(), v.contiguous(), index, scale)
    return to_map(out, grid, (H, W))


def _masked(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float) -> Tensor:
    B, _, P, T, _ = q.shape
    mask = q.new_full((B, P, P), -math.inf).scatter(2, index, 0.0)
    mask = mask[:, None, :, None, :, None].expand(B, 1, P, T, P, T).reshape(B, 1, P * T, P * T)
    q, k, v = (x.flatten(2, 3) for x in (q, k, v))  # (B, h, P * T, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _forward(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float) -> Tensor:
    """q, k, v ``(B, h, P, T, d)`` contiguous, index ``(B, P, topk)``; returns ``(B, h, P, T, dv)``."""
    T = q.shape[3]
    out = v.new_empty(*q.shape[:-1], v.shape[-1])
    q_rows, out_rows, k_rows, v_rows = (x.flatten(0, 2) for x in (q, out, k, v))  # (B * h * P, T, d)
    for rows, picked in _chunks(q, v, index):
        keys = k_rows.index_select(0, picked).reshape(len(rows), -1, k.shape[-1])  # (c, topk * T, d)
        values = v_rows.index_select(0, picked).reshape(len(rows), -1, v.shape[-1])
        span = slice(rows.start, rows.stop)
        out_rows[span] = F.scaled_dot_product_attention(
            q_rows[None, span].view(1, -1, T, q.shape[-1]), keys[None], values[None], scale=scale
        )[0]
    return out


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32  # sums over queries stay in full precision
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=exact) for x in (k, v))
    k_rows, v_rows, dk_rows, dv_rows = (x.flatten(0, 2) for x in (k, v, dk, dv))
    q_rows, dq_rows, dout_rows = (x.flatten(0, 2) for x in (q, dq, dout.contiguous()))
    for rows, picked in _chunks(q, v, index):
        span = slice(rows.start, rows.stop)
        queries, grads = q_rows[span].to(exact) * scale, dout_rows[span].to(exact)  # (c, T, d)
        keys = k_rows.index_select(0, picked).reshape(len(rows), -1, k.shape[-1]).to(exact)
        values = v_rows.index_select(0, picked).reshape(len(rows), -1, v.shape[-1]).to(exact)
        attn = (queries @ keys.transpose(1, 2)).softmax(dim=-1)  # (c, T, topk * T)
        dv_rows.index_add_(0, picked, (attn.transpose(1, 2) @ grads).view(len(picked), -1, v.shape[-1]))
        dlogits = torch.ops.aten._softmax_backward_data(grads @ values.transpose(1, 2), attn, -1, attn.dtype)
        dq_rows[span] = (dlogits @ keys).mul_(scale)
        dk_rows.index_add_(0, picked, (dlogits.transpose(1, 2) @ queries).view(len(picked), -1, k.shape[-1]))
    return dq, dk.to(k.dtype), dv.to(v.dtype), index.new_empty(0)


def _chunks(q: Tensor, v: Tensor, index: Tensor) -> Iterator[tuple[range, Tensor]]:
    """Yield runs of query rows (one per batch item, head and region) and the key rows that each run picks."""
    B, h, P, T, d = q.shape
    topk = index.shape[2]
    base = torch.arange(B * h, device=index.device).view(B, h, 1, 1) * P
    picked = (index[:, None] + base).view(B * h * P, topk)  # (rows, topk)
    row_bytes = topk * T * (d + v.shape[-1] + 2 * T) * q.element_size()
    step = max(1, CHUNK_BYTES // row_bytes)
    for start in range(0, B * h * P, step):
        stop = min(start + step, B * h * P)
        yield range(start, stop), picked[start:stop].reshape(-1)


def _fake(q: Tensor, k: Tensor, v: Tensor, index: Tensor, scale: float) -> Tensor:
    return v.new_empty(*q.shape[:-1], v.shape[-1])


# The chunk loop is opaque to compilers: its trip count depends on the shape and must not be unrolled.
_chunked = differentiable("routed_attention_chunked", _forward, _fake, _backward)
