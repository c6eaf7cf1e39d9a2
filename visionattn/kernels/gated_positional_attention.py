"""Gated positional attention: content in blocks of the N x N matrix, position one axis at a time.

The positional softmax is the product of one along rows and one along columns, so it costs N * (H + W) products instead
of N * N, which for the 196 to 1536 tokens of ConViT's maps is 7 to 19 times fewer than a second matrix in the pass over
the keys would add to it. What is fused is what would otherwise go through memory: the weights, which are computed where
they are used; the mix, which the second axis does as it ends; and the gradients of the positional parameters, which are
scalars of each line of the map. Forward: content (read q, k, v; write content and softmax statistics), columns (read v,
write what rows need), rows (read it and content, write the result). Backward: columns again, rows and columns
transposed, then queries, then keys and values, which add both gradients of the values.

Logits of position grow with the square of the map, and so would their rounding and that of the means which the
softmax's gradient subtracts. So distances are counted from the one that weighs most: the logit of distance ``e`` less
that of ``p`` is ``(e - p) * (linear + square * (e + p))``, in which nothing large cancels.

Letters: B batch, h heads, N = H * W tokens, d channels, dv channels of values. Logits of content are in units of log 2;
those of position are not, for factors rounded to other units would put every distance wrong in the same direction.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels._blocks import LOG2E, attention_configs, block, dot, load_rows, products, store_rows
from visionattn.kernels._launch import Config, launch
from visionattn.kernels._layout import heads_last, rows
from visionattn.kernels._softmax import load_stats, online_softmax, store_stats

COLUMNS, ROWS = 0, 1  # the axis that a query attends along: within its row, or within its column


def forward(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, gate: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend: ``(B, h, H, W, dv)``; for the backward pass, the content's part of it, its softmax statistics ``(B, h, N,
    2)`` (`load_stats`), and what `_axes` says of each position on an axis ``(4, h, W + H)``.
    """
    v, position = rows(v), position.contiguous()
    B, h, H, W, dv = v.shape
    q, k, tokens = (rows(x.flatten(2, 3)) for x in (q, k, v))
    N, d = q.shape[2:]
    content, out, between = (heads_last(v, v.shape) for _ in range(3))
    stats, axes = (v.new_empty(shape, dtype=torch.float32) for shape in ((B, h, N, 2), (4, h, W + H)))
    launch(
        _axes,
        lambda b: h * triton.cdiv(W + H, b["BLOCK_I"]),
        *(position, axes, h, H, W, LOG2E),
        configs=[Config({"BLOCK_I": 16, "BLOCK_L": 64}, warps=4)],
    )
    results = content.flatten(2, 3)
    strides = [s for x in (q, k, tokens, results) for s in x.stride()[:3]]
    launch(
        _content,
        lambda b: B * h * triton.cdiv(N, b["BLOCK_N"]),
        *(q, k, tokens, results, stats, *strides, h, N, scale * LOG2E),
        configs=attention_configs(q.dtype, max(d, dv), own="BLOCK_N", other="BLOCK_S"),
        **_widths(d, dv),
    )
    _along(COLUMNS, v, position, axes, between)
    _along(ROWS, between, position, axes, out, mix=(content, gate.contiguous()))
    return out, content, stats, axes


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    gate: Tensor,
    scale: float,
    content: Tensor,
    stats: Tensor,
    axes: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, position and gate."""
    dout, v, position, gate = rows(dout), rows(v), position.contiguous(), gate.contiguous()
    B, h, *_, dv = v.shape
    between, by_rows, by_position = (heads_last(v, v.shape) for _ in range(3))
    _along(COLUMNS, v, position, axes, between)
    rows_sums = _along_backward(ROWS, dout, between, position, axes, by_rows)
    columns_sums = _along_backward(COLUMNS, by_rows, v, position, axes, by_position)
    dposition = torch.stack([columns_sums[:, 0], rows_sums[:, 0], columns_sums[:, 1] + rows_sums[:, 1]], dim=1)

    dq, dk, dvalues = (heads_last(x, x.shape) for x in (q, k, v))
    q, k, v, grads = (rows(x.flatten(2, 3)) for x in (q, k, v, dout))
    to_q, to_k, to_v, content, by_position = (x.flatten(2, 3) for x in (dq, dk, dvalues, content, by_position))
    N, d = q.shape[2:]
    sums, positional_sums = stats.new_empty(B, h, N), stats.new_empty(B, h, N)
    inputs = [s for x in (q, k, v, grads) for s in x.stride()[:3]]
    launch(
        _backward_q,
        lambda b: B * h * triton.cdiv(N, b["BLOCK_N"]),
        *(q, k, v, grads, content, gate, stats, sums, to_q),
        *(*inputs, *content.stride()[:3], *to_q.stride()[:3], h, N, scale, scale * LOG2E),
        configs=attention_configs(q.dtype, max(d, dv), own="BLOCK_N", other="BLOCK_S"),
        **_widths(d, dv),
    )
    launch(
        _backward_kv,
        lambda b: B * h * triton.cdiv(N, b["BLOCK_S"]),
        *(q, k, v, grads, by_position, gate, stats, sums, positional_sums, to_k, to_v, *inputs),
        *(*by_position.stride()[:3], *to_k.stride()[:3], *to_v.stride()[:3], h, N, scale, scale * LOG2E),
        # One stage: with two, sm_100 spills four bytes at the widths of ConViT's heads.
        configs=[replace(c, stages=1) for c in attention_configs(q.dtype, max(d, dv), own="BLOCK_S", other="BLOCK_N")],
        **_widths(d, dv),
    )
    dgate = positional_sums.sum((0, 2)) - sums.sum((0, 2))
    return dq, dk, dvalues, (dposition * gate[:, None]).to(position.dtype), dgate.to(gate.dtype)


def _along(
    axis: int, x: Tensor, position: Tensor, axes: Tensor, y: Tensor, mix: tuple[Tensor, Tensor] | None = None
) -> None:
    """Attend by position along one axis; ``mix`` holds what the result is mixed with and its share of the mixture."""
    B, h, H, W, dv = x.shape
    lines, size = (H, W) if axis == COLUMNS else (W, H)
    content, gate = (x, position) if mix is None else mix
    launch(
        _axis,
        lambda b: B * h * lines * triton.cdiv(size, b["BLOCK_I"]),
        *(x, position, axes, content, gate, y, *(s for t in (x, content, y) for s in _line_strides(t, axis))),
        *(h, lines, size, H + W, LOG2E),
        configs=_axis_configs(x.dtype, size),
        **{"AXIS": axis, "MIX": mix is not None, "DV": dv, "BLOCK_DV": block(dv)},
    )


def _along_backward(axis: int, dy: Tensor, x: Tensor, position: Tensor, axes: Tensor, dx: Tensor) -> Tensor:
    """Write the gradient of `_along`'s ``x``; return those of the factors of distance and its square ``(h, 2)``."""
    B, h, H, W, dv = x.shape
    lines, size = (H, W) if axis == COLUMNS else (W, H)
    sums = x.new_empty(B, h, lines, 2, dtype=torch.float32)
    launch(
        _axis_backward,
        lambda b: B * h * lines,
        *(dy, x, position, axes, dx, sums, *(s for t in (dy, x, dx) for s in _line_strides(t, axis))),
        *(h, lines, size, H + W, LOG2E),
        configs=[Config({"BLOCK_I": 16, "BLOCK_L": 16}, warps=8 if x.dtype == torch.float32 else 4, stages=1)],
        **{"AXIS": axis, "DV": dv, "BLOCK_DV": block(dv)},
    )
    return sums.sum((0, 2))


def _line_strides(x: Tensor, axis: int) -> tuple[int, int, int, int]:
    """Strides of batch, heads, lines and positions on a line."""
    b, h, y, along_x, _ = x.stride()
    return (b, h, y, along_x) if axis == COLUMNS else (b, h, along_x, y)


def _axis_configs(dtype: torch.dtype, size: int) -> list[Config]:
    """Square blocks, no larger than a line holds tokens; half as large for operands of twice the size."""
    side = min(block(size), 32 if dtype == torch.float32 else 64)
    return [Config({"BLOCK_I": side, "BLOCK_L": side}, warps=4)]


def _widths(d: int, dv: int) -> dict[str, int]:
    return {"D": d, "DV": dv, "BLOCK_D": block(d), "BLOCK_DV": block(dv)}


@triton.jit
def _factors(position, head, axis):
    """Factors of the distance and of its square."""
    return tl.load(position + head * 3 + axis).to(tl.float32), tl.load(position + head * 3 + 2).to(tl.float32)


@triton.jit
def _axes(position, axes, heads, H, W, log2e, BLOCK_I: tl.constexpr, BLOCK_L: tl.constexpr):
    """Of each query on an axis: the distance that weighs most, ``p``; the inverse of the sum of weights relative to it;
    the means of distance and of its square, less ``p`` and its square.
    """
    blocks = tl.cdiv(H + W, BLOCK_I)
    head = tl.program_id(0) // blocks
    at = tl.program_id(0) % blocks * BLOCK_I + tl.arange(0, BLOCK_I)  # first those on columns, then those on rows
    i, size = tl.where(at < W, at, at - W)[:, None], tl.where(at < W, W, H)[:, None]
    by_column, square = _factors(position, head, 0)
    by_row, _ = _factors(position, head, 1)
    linear = tl.where(at < W, by_column, by_row)[:, None]

    top = tl.full((BLOCK_I,), float("-inf"), tl.float32)
    peak = tl.zeros((BLOCK_I,), tl.float32)
    for start in range(0, tl.maximum(H, W), BLOCK_L):
        other = start + tl.arange(0, BLOCK_L)[None, :]
        distance = (other - i).to(tl.float32)
        logits = tl.where(other < size, distance * (linear + square * distance), float("-inf"))
        block_top = tl.max(logits, 1)
        farthest = tl.max(tl.where(logits == block_top[:, None], distance, float("-inf")), 1)
        peak = tl.where(block_top > top, farthest, peak)
        top = tl.maximum(top, block_top)
    total = tl.zeros((BLOCK_I,), tl.float32)
    distances = tl.zeros((BLOCK_I,), tl.float32)
    squares = tl.zeros((BLOCK_I,), tl.float32)
    for start in range(0, tl.maximum(H, W), BLOCK_L):
        other = start + tl.arange(0, BLOCK_L)[None, :]
        distance = (other - i).to(tl.float32)
        past, both = distance - peak[:, None], distance + peak[:, None]
        weights = tl.exp2(tl.where(other < size, past * (linear + square * both) * log2e, float("-inf")))
        total += tl.sum(weights, 1)
        distances += tl.sum(weights * past, 1)
        squares += tl.sum(weights * (past * both), 1)
    axes += head * (H + W) + at
    tl.store(axes, peak, mask=at < H + W)
    tl.store(axes + heads * (H + W), 1.0 / total, mask=at < H + W)
    tl.store(axes + 2 * heads * (H + W), distances / total, mask=at < H + W)
    tl.store(axes + 3 * heads * (H + W), squares / total, mask=at < H + W)


@triton.jit
def _axis(
    x, position, axes, content, gate, y,
    x_b, x_h, x_line, x_i, c_b, c_h, c_line, c_i, y_b, y_h, y_line, y_i,
    heads, lines, size, axes_size, log2e,
    AXIS: tl.constexpr, MIX: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(size, BLOCK_I)
    part = tl.program_id(0) // blocks
    line, group = (part % lines).to(tl.int64), (part // lines).to(tl.int64)
    b, head = group // heads, group % heads
    x += b * x_b + head * x_h + line * x_line
    axes += head * axes_size + (axes_size - size if AXIS == 1 else 0)
    i = tl.program_id(0) % blocks * BLOCK_I + tl.arange(0, BLOCK_I)
    linear, square = _factors(position, head, AXIS)
    peak = tl.load(axes + i, mask=i < size, other=0.0)
    inverse = tl.load(axes + heads * axes_size + i, mask=i < size, other=0.0)

    result = tl.zeros((BLOCK_I, BLOCK_DV), tl.float32)
    for start in range(0, size, BLOCK_L):
        at = start + tl.arange(0, BLOCK_L)
        values = load_rows(x, at, x_i, at < size, DV, BLOCK_DV)
        distance = (at[None, :] - i[:, None]).to(tl.float32)
        past, both = distance - peak[:, None], distance + peak[:, None]
        valid = (at < size)[None, :] & (i < size)[:, None]
        weights = tl.exp2(tl.where(valid, past * (linear + square * both) * log2e, float("-inf"))) * inverse[:, None]
        result = dot(weights.to(values.dtype), values, result)
    if MIX:
        share = tl.load(gate + head).to(tl.float32)
        content += b * c_b + head * c_h + line * c_line
        result = share * result + (1.0 - share) * load_rows(content, i, c_i, i < size, DV, BLOCK_DV).to(tl.float32)
    store_rows(y + b * y_b + head * y_h + line * y_line, i, y_i, i < size, result, DV, BLOCK_DV)


@triton.jit
def _axis_backward(
    dy, x, position, axes, dx, sums,
    dy_b, dy_h, dy_line, dy_i, x_b, x_h, x_line, x_i, dx_b, dx_h, dx_line, dx_i,
    heads, lines, size, axes_size, log2e,
    AXIS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    line, group = (tl.program_id(0) % lines).to(tl.int64), (tl.program_id(0) // lines).to(tl.int64)
    b, head = group // heads, group % heads
    dy += b * dy_b + head * dy_h + line * dy_line
    x += b * x_b + head * x_h + line * x_line
    dx += b * dx_b + head * dx_h + line * dx_line
    axes += head * axes_size + (axes_size - size if AXIS == 1 else 0)
    linear, square = _factors(position, head, AXIS)

    dlinear = tl.zeros((BLOCK_L,), tl.float32)
    dsquare = tl.zeros((BLOCK_L,), tl.float32)
    for first in range(0, size, BLOCK_L):
        at = first + tl.arange(0, BLOCK_L)  # keys
        values = load_rows(x, at, x_i, at < size, DV, BLOCK_DV)
        result = tl.zeros((BLOCK_L, BLOCK_DV), tl.float32)
        for start in range(0, size, BLOCK_I):
            i = start + tl.arange(0, BLOCK_I)  # queries
            grads = load_rows(dy, i, dy_i, i < size, DV, BLOCK_DV)
            peak = tl.load(axes + i, mask=i < size, other=0.0)
            inverse = tl.load(axes + heads * axes_size + i, mask=i < size, other=0.0)
            mean = tl.load(axes + 2 * heads * axes_size + i, mask=i < size, other=0.0)
            mean_square = tl.load(axes + 3 * heads * axes_size + i, mask=i < size, other=0.0)
            distance = (at[:, None] - i[None, :]).to(tl.float32)
            past, both = distance - peak[None, :], distance + peak[None, :]
            valid = (at < size)[:, None] & (i < size)[None, :]
            weights = tl.exp2(tl.where(valid, past * (linear + square * both) * log2e, float("-inf")))
            weights *= inverse[None, :]
            result = dot(weights.to(grads.dtype), grads, result)
            x_at, dy_at = at.to(tl.int64) * x_i, i.to(tl.int64) * dy_i
            dweights = weights * products(values, grads, x, x_at, at < size, dy, dy_at, i < size, DV, BLOCK_DV)
            dlinear += tl.sum(dweights * (past - mean[None, :]), 1)
            dsquare += tl.sum(dweights * (past * both - mean_square[None, :]), 1)
        store_rows(dx, at, dx_i, at < size, result, DV, BLOCK_DV)
    sums += tl.program_id(0).to(tl.int64) * 2
    tl.store(sums, tl.sum(dlinear, 0))
    tl.store(sums + 1, tl.sum(dsquare, 0))


@triton.jit
def _content(
    q, k, v, out, stats,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n,
    heads, N, scale2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_N)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    b, head = group // heads, group % heads
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    queries = load_rows(q + b * q_b + head * q_h, n, q_n, n < N, D, BLOCK_D)

    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    result = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for start in range(0, N, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        keys = load_rows(k, s, k_n, s < N, D, BLOCK_D)
        logits = dot(queries, tl.trans(keys)) * scale2
        logits = tl.where((s < N)[None, :], logits, float("-inf"))
        weights, shrink, top, total = online_softmax(logits, top, total)
        values = load_rows(v, s, v_n, s < N, DV, BLOCK_DV)
        result = dot(weights.to(values.dtype), values, result * shrink[:, None])
    inverse = store_stats(stats, group * N + n, n < N, top, total)
    store_rows(out + b * out_b + head * out_h, n, out_n, n < N, result * inverse[:, None], DV, BLOCK_DV)


@triton.jit
def _backward_q(
    q, k, v, dout, content, gate, stats, sums, dq,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, c_b, c_h, c_n, dq_b, dq_h, dq_n,
    heads, N, scale, scale2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_N)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    b, head = group // heads, group % heads
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    queries = load_rows(q + b * q_b + head * q_h, n, q_n, n < N, D, BLOCK_D)
    grads = load_rows(dout + b * do_b + head * do_h, n, do_n, n < N, DV, BLOCK_DV)
    results = load_rows(content + b * c_b + head * c_h, n, c_n, n < N, DV, BLOCK_DV)
    row_sum = tl.sum(grads.to(tl.float32) * results.to(tl.float32), 1)
    tl.store(sums + group * N + n, row_sum, mask=n < N)
    top, inverse = load_stats(stats, group * N + n, n < N)

    dqueries = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, N, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        keys = load_rows(k, s, k_n, s < N, D, BLOCK_D)
        values = load_rows(v, s, v_n, s < N, DV, BLOCK_DV)
        logits = dot(queries, tl.trans(keys)) * scale2
        attn = tl.where((s < N)[None, :], tl.exp2(logits - top[:, None]) * inverse[:, None], 0.0)
        dlogits = attn * (dot(grads, tl.trans(values)) - row_sum[:, None])
        dqueries = dot(dlogits.to(keys.dtype), keys, dqueries)
    dqueries *= scale * (1.0 - tl.load(gate + head).to(tl.float32))
    store_rows(dq + b * dq_b + head * dq_h, n, dq_n, n < N, dqueries, D, BLOCK_D)


@triton.jit
def _backward_kv(
    q, k, v, dout, by_position, gate, stats, sums, positional_sums, dk, dv,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n,
    p_b, p_h, p_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    heads, N, scale, scale2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_S)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    b, head = group // heads, group % heads
    q += b * q_b + head * q_h
    dout += b * do_b + head * do_h
    s = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    keys = load_rows(k + b * k_b + head * k_h, s, k_n, s < N, D, BLOCK_D)
    values = load_rows(v + b * v_b + head * v_h, s, v_n, s < N, DV, BLOCK_DV)

    dkeys = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    dvalues = tl.zeros((BLOCK_S, BLOCK_DV), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        queries = load_rows(q, n, q_n, n < N, D, BLOCK_D)
        grads = load_rows(dout, n, do_n, n < N, DV, BLOCK_DV)
        top, inverse = load_stats(stats, group * N + n, n < N)
        row_sum = tl.load(sums + group * N + n, mask=n < N, other=0.0)
        logits = dot(keys, tl.trans(queries)) * scale2  # (keys, queries)
        attn = tl.exp2(logits - top[None, :]) * inverse[None, :]
        dvalues = dot(attn.to(grads.dtype), grads, dvalues)
        dlogits = attn * (dot(values, tl.trans(grads)) - row_sum[None, :])
        dkeys = dot(dlogits.to(queries.dtype), queries, dkeys)
    share = tl.load(gate + head).to(tl.float32)
    store_rows(dk + b * dk_b + head * dk_h, s, dk_n, s < N, dkeys * (scale * (1.0 - share)), D, BLOCK_D)
    more = load_rows(by_position + b * p_b + head * p_h, s, p_n, s < N, DV, BLOCK_DV).to(tl.float32)
    tl.store(positional_sums + group * N + s, tl.sum(values.to(tl.float32) * more, 1), mask=s < N)
    dvalues = (1.0 - share) * dvalues + share * more
    store_rows(dv + b * dv_b + head * dv_h, s, dv_n, s < N, dvalues, DV, BLOCK_DV)
