"""Attention to routed regions, whose keys and values are read where they lie in the map.

A program holds queries of one region and walks over the tokens of the regions routed to it as one list, so that a block
of keys holds the tokens of several small regions. A map is never cut into regions, nor are keys gathered: both are
addresses. The forward pass reads the queries and each routed key once and keeps the softmax's statistics. So does the
backward pass for queries. That for keys and values walks from every region over the regions that route to it, by
the inverse of the index: a list sorted once, as long as the index.

Letters: B batch, h heads, P regions, T tokens of a region, d channels, dv channels of values. Logits are in units of
log 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels._blocks import LOG2E, attention_configs, block, dot, load_rows, store_rows
from visionattn.kernels._launch import Config, launch
from visionattn.kernels._layout import heads_last, rows
from visionattn.kernels._softmax import load_stats, online_softmax, store_stats


def forward(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, grid: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    """Attend: ``(B, h, H, W, dv)``, and softmax statistics ``(B, h, P, T, 2)`` for the backward pass (`load_stats`)."""
    q, k, v = rows(q), rows(k), rows(v)
    B, h, H, W, d = q.shape
    P, topk = index.shape[1:]
    region = (H // grid[0], W // grid[1])
    T, dv = region[0] * region[1], v.shape[-1]
    out, stats = heads_last(v, (B, h, H, W, dv)), q.new_empty(B, h, P, T, 2, dtype=torch.float32)
    strides = [s for x in (q, k, v, out) for s in x.stride()[:4]]
    launch(
        _forward,
        lambda b: B * h * P * triton.cdiv(T, b["BLOCK_N"]),
        *(q, k, v, index.contiguous(), out, stats, *strides, h, P, topk, grid[1], *region, scale * LOG2E),
        configs=_configs(q.dtype, max(d, dv), T, own="BLOCK_N", other="BLOCK_S"),
        **_widths(d, dv),
    )
    return out, stats


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    grid: tuple[int, int],
    scale: float,
    out: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    dout, q, k, v = rows(dout), rows(q), rows(k), rows(v)
    B, h, H, W, d = q.shape
    P, topk = index.shape[1:]
    region = (H // grid[0], W // grid[1])
    T, dv = region[0] * region[1], v.shape[-1]
    dq, dk, dvalues = (heads_last(x, x.shape) for x in (q, k, v))
    sums = stats.new_empty(B, h, P, T)
    inputs = [s for x in (q, k, v, dout) for s in x.stride()[:4]]
    sizes = (grid[1], *region, scale, scale * LOG2E)
    launch(
        _backward_q,
        lambda b: B * h * P * triton.cdiv(T, b["BLOCK_N"]),
        *(q, k, v, index.contiguous(), out, dout, stats, sums, dq),
        *(*inputs, *out.stride()[:4], *dq.stride()[:4], h, P, topk, *sizes),
        configs=_configs(q.dtype, max(d, dv), T, own="BLOCK_N", other="BLOCK_S"),
        **_widths(d, dv),
    )
    sources, starts = _inverse(index)
    launch(
        _backward_kv,
        lambda b: B * h * P * triton.cdiv(T, b["BLOCK_S"]),
        *(q, k, v, sources, starts, dout, stats, sums, dk, dvalues),
        *(*inputs, *dk.stride()[:4], *dvalues.stride()[:4], h, P, *sizes),
        configs=_configs(q.dtype, max(d, dv), T, own="BLOCK_S", other="BLOCK_N"),
        **_widths(d, dv),
    )
    return dq, dk, dvalues


def _inverse(index: Tensor) -> tuple[Tensor, Tensor]:
    """Regions that route to each region, one list after the other, and where each list starts: ``(B * P + 1,)``."""
    B, P, topk = index.shape
    items = torch.arange(B, device=index.device).view(B, 1, 1) * P
    targets, order = (index + items).flatten().sort(stable=True)
    starts = torch.searchsorted(targets, torch.arange(B * P + 1, device=index.device))
    return order // topk % max(P, 1), starts


def _configs(dtype: torch.dtype, width: int, tokens: int, *, own: str, other: str) -> list[Config]:
    """Blocks no larger than a region holds tokens."""
    configs = [
        Config({**c.blocks, own: min(c.blocks[own], block(tokens))}, c.warps, c.stages)
        for c in attention_configs(dtype, width, own=own, other=other)
    ]
    return [c for i, c in enumerate(configs) if c.blocks not in [x.blocks for x in configs[:i]]]


def _widths(d: int, dv: int) -> dict[str, int]:
    return {"D": d, "DV": dv, "BLOCK_D": block(d), "BLOCK_DV": block(dv)}


@triton.jit
def _at(region, token, grid_w, region_h, region_w, row_stride, column_stride):
    """Where a token of a region lies in a map."""
    row = region // grid_w * region_h + token // region_w
    column = region % grid_w * region_w + token % region_w
    return row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride


@triton.jit
def _program(own_blocks, heads, P):
    """The block, region, batch item and head of this program, and its group: item and head as one number."""
    part = tl.program_id(0) // own_blocks
    group = (part // P).to(tl.int64)
    return tl.program_id(0) % own_blocks, part % P, group // heads, group % heads, group


@triton.jit
def _forward(
    q, k, v, index, out, stats,
    q_b, q_h, q_y, q_x, k_b, k_h, k_y, k_x, v_b, v_h, v_y, v_x, out_b, out_h, out_y, out_x,
    heads, P, topk, grid_w, region_h, region_w, scale2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    T = region_h * region_w
    part, region, b, head, group = _program(tl.cdiv(T, BLOCK_N), heads, P)
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    index += (b * P + region) * topk
    n = part * BLOCK_N + tl.arange(0, BLOCK_N)
    q_at = _at(region, n, grid_w, region_h, region_w, q_y, q_x)
    queries = load_rows(q + b * q_b + head * q_h, q_at, 1, n < T, D, BLOCK_D)

    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    result = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for start in range(0, topk * T, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)  # among the tokens of all routed regions
        valid = s < topk * T
        target = tl.load(index + s // T, mask=valid, other=0).to(tl.int32)
        keys = load_rows(k, _at(target, s % T, grid_w, region_h, region_w, k_y, k_x), 1, valid, D, BLOCK_D)
        logits = dot(queries, tl.trans(keys)) * scale2
        logits = tl.where(valid[None, :], logits, float("-inf"))
        weights, shrink, top, total = online_softmax(logits, top, total)
        values = load_rows(v, _at(target, s % T, grid_w, region_h, region_w, v_y, v_x), 1, valid, DV, BLOCK_DV)
        result = dot(weights.to(values.dtype), values, result * shrink[:, None])
    inverse = store_stats(stats, (group * P + region) * T + n, n < T, top, total)
    out_at = _at(region, n, grid_w, region_h, region_w, out_y, out_x)
    store_rows(out + b * out_b + head * out_h, out_at, 1, n < T, result * inverse[:, None], DV, BLOCK_DV)


@triton.jit
def _backward_q(
    q, k, v, index, out, dout, stats, sums, dq,
    q_b, q_h, q_y, q_x, k_b, k_h, k_y, k_x, v_b, v_h, v_y, v_x, do_b, do_h, do_y, do_x,
    out_b, out_h, out_y, out_x, dq_b, dq_h, dq_y, dq_x,
    heads, P, topk, grid_w, region_h, region_w, scale, scale2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    T = region_h * region_w
    part, region, b, head, group = _program(tl.cdiv(T, BLOCK_N), heads, P)
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    index += (b * P + region) * topk
    n = part * BLOCK_N + tl.arange(0, BLOCK_N)
    q_at = _at(region, n, grid_w, region_h, region_w, q_y, q_x)
    queries = load_rows(q + b * q_b + head * q_h, q_at, 1, n < T, D, BLOCK_D)
    do_at = _at(region, n, grid_w, region_h, region_w, do_y, do_x)
    grads = load_rows(dout + b * do_b + head * do_h, do_at, 1, n < T, DV, BLOCK_DV)
    out_at = _at(region, n, grid_w, region_h, region_w, out_y, out_x)
    results = load_rows(out + b * out_b + head * out_h, out_at, 1, n < T, DV, BLOCK_DV)
    row_sum = tl.sum(grads.to(tl.float32) * results.to(tl.float32), 1)
    at = (group * P + region) * T + n
    tl.store(sums + at, row_sum, mask=n < T)
    top, inverse = load_stats(stats, at, n < T)

    dqueries = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, topk * T, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        valid = s < topk * T
        target = tl.load(index + s // T, mask=valid, other=0).to(tl.int32)
        keys = load_rows(k, _at(target, s % T, grid_w, region_h, region_w, k_y, k_x), 1, valid, D, BLOCK_D)
        values = load_rows(v, _at(target, s % T, grid_w, region_h, region_w, v_y, v_x), 1, valid, DV, BLOCK_DV)
        logits = dot(queries, tl.trans(keys)) * scale2
        attn = tl.where(valid[None, :], tl.exp2(logits - top[:, None]) * inverse[:, None], 0.0)
        dlogits = attn * (dot(grads, tl.trans(values)) - row_sum[:, None])
        dqueries = dot(dlogits.to(keys.dtype), keys, dqueries)
    dq_at = _at(region, n, grid_w, region_h, region_w, dq_y, dq_x)
    store_rows(dq + b * dq_b + head * dq_h, dq_at, 1, n < T, dqueries * scale, D, BLOCK_D)


@triton.jit
def _backward_kv(
    q, k, v, sources, starts, dout, stats, sums, dk, dv,
    q_b, q_h, q_y, q_x, k_b, k_h, k_y, k_x, v_b, v_h, v_y, v_x, do_b, do_h, do_y, do_x,
    dk_b, dk_h, dk_y, dk_x, dv_b, dv_h, dv_y, dv_x,
    heads, P, grid_w, region_h, region_w, scale, scale2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    T = region_h * region_w
    part, region, b, head, group = _program(tl.cdiv(T, BLOCK_S), heads, P)
    q += b * q_b + head * q_h
    dout += b * do_b + head * do_h
    s = part * BLOCK_S + tl.arange(0, BLOCK_S)
    k_at = _at(region, s, grid_w, region_h, region_w, k_y, k_x)
    keys = load_rows(k + b * k_b + head * k_h, k_at, 1, s < T, D, BLOCK_D)
    v_at = _at(region, s, grid_w, region_h, region_w, v_y, v_x)
    values = load_rows(v + b * v_b + head * v_h, v_at, 1, s < T, DV, BLOCK_DV)
    first = tl.load(starts + b * P + region)
    queries_here = (tl.load(starts + b * P + region + 1) - first).to(tl.int32) * T
    sources += first

    dkeys = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    dvalues = tl.zeros((BLOCK_S, BLOCK_DV), tl.float32)
    for start in range(0, queries_here, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)  # among the tokens of all regions that route here
        valid = n < queries_here
        source = tl.load(sources + n // T, mask=valid, other=0).to(tl.int32)
        queries = load_rows(q, _at(source, n % T, grid_w, region_h, region_w, q_y, q_x), 1, valid, D, BLOCK_D)
        grads = load_rows(dout, _at(source, n % T, grid_w, region_h, region_w, do_y, do_x), 1, valid, DV, BLOCK_DV)
        at = (group * P + source) * T + n % T
        top, inverse = load_stats(stats, at, valid)
        row_sum = tl.load(sums + at, mask=valid, other=0.0)
        logits = dot(keys, tl.trans(queries)) * scale2  # (keys, queries)
        attn = tl.exp2(logits - top[None, :]) * inverse[None, :]
        dvalues = dot(attn.to(grads.dtype), grads, dvalues)
        dlogits = attn * (dot(values, tl.trans(grads)) - row_sum[None, :])
        dkeys = dot(dlogits.to(queries.dtype), queries, dkeys)
    dk_at = _at(region, s, grid_w, region_h, region_w, dk_y, dk_x)
    store_rows(dk + b * dk_b + head * dk_h, dk_at, 1, s < T, dkeys * scale, D, BLOCK_D)
    dv_at = _at(region, s, grid_w, region_h, region_w, dv_y, dv_x)
    store_rows(dv + b * dv_b + head * dv_h, dv_at, 1, s < T, dvalues, DV, BLOCK_DV)
