"""Softmax attention with stretched and clipped probabilities; the N x S matrix lives in blocks alone.

Clipping needs the finished softmax, so the forward pass sees the keys twice: once for the sum of exponentials of each
query, once for the values. So does the backward pass over queries: clipped probabilities do not sum to one, and the row
sums that the softmax's gradient subtracts are not those of the output.

Letters: B batch, h heads, N queries, S keys, d channels, dv channels of values. Logits are in units of log 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels._blocks import LOG2E, attention_configs, block, dot, load_rows, store_rows
from visionattn.kernels._launch import launch
from visionattn.kernels._layout import heads_last, rows
from visionattn.kernels._softmax import load_stats, online_softmax, store_stats


def forward(q: Tensor, k: Tensor, v: Tensor, gamma: float, zeta: float, scale: float) -> tuple[Tensor, Tensor]:
    """Attend: ``(B, h, N, dv)``, and softmax statistics ``(B, h, N, 2)`` for the backward pass (`load_stats`)."""
    q, k, v = rows(q), rows(k), rows(v)
    B, h, N, d = q.shape
    S, dv = v.shape[2:]
    out, stats = heads_last(v, (B, h, N, dv)), q.new_empty(B, h, N, 2, dtype=torch.float32)
    strides = [s for x in (q, k, v, out) for s in x.stride()[:3]]
    launch(
        _forward,
        lambda b: B * h * triton.cdiv(N, b["BLOCK_N"]),
        *(q, k, v, out, stats, *strides, h, N, S, scale * LOG2E, gamma, zeta),
        configs=attention_configs(q.dtype, max(d, dv), own="BLOCK_N", other="BLOCK_S"),
        **_widths(d, dv),
    )
    return out, stats


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, gamma: float, zeta: float, scale: float, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    dout, q, k, v = rows(dout), rows(q), rows(k), rows(v)
    B, h, N, d = q.shape
    S, dv = v.shape[2:]
    dq, dk, dvalues = (heads_last(x, x.shape) for x in (q, k, v))
    sums = stats.new_empty(B, h, N)
    inputs = [s for x in (q, k, v, dout) for s in x.stride()[:3]]
    launch(
        _backward_q,
        lambda b: B * h * triton.cdiv(N, b["BLOCK_N"]),
        *(q, k, v, dout, stats, sums, dq, *inputs, *dq.stride()[:3], h, N, S, scale, scale * LOG2E, gamma, zeta),
        configs=attention_configs(q.dtype, max(d, dv), own="BLOCK_N", other="BLOCK_S"),
        **_widths(d, dv),
    )
    launch(
        _backward_kv,
        lambda b: B * h * triton.cdiv(S, b["BLOCK_S"]),
        *(q, k, v, dout, stats, sums, dk, dvalues, *inputs, *dk.stride()[:3], *dvalues.stride()[:3]),
        *(h, N, S, scale, scale * LOG2E, gamma, zeta),
        configs=attention_configs(q.dtype, max(d, dv), own="BLOCK_S", other="BLOCK_N"),
        **_widths(d, dv),
    )
    return dq, dk, dvalues


def _widths(d: int, dv: int) -> dict[str, int]:
    return {"D": d, "DV": dv, "BLOCK_D": block(d), "BLOCK_DV": block(dv)}


@triton.jit
def _forward(
    q, k, v, out, stats,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n,
    heads, N, S, scale2, gamma, zeta,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_N)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    b, head = group // heads, group % heads
    q += b * q_b + head * q_h
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    out += b * out_b + head * out_h
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    queries = load_rows(q, n, q_n, n < N, D, BLOCK_D)

    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)  # largest logit so far
    total = tl.zeros((BLOCK_N,), tl.float32)  # sum of exponentials, relative to it
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        keys = load_rows(k, s, k_n, s < S, D, BLOCK_D)
        logits = dot(queries, tl.trans(keys)) * scale2
        logits = tl.where((s < S)[None, :], logits, float("-inf"))
        _, _, top, total = online_softmax(logits, top, total)
    inverse = store_stats(stats, group * N + n, n < N, top, total)

    result = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        keys = load_rows(k, s, k_n, s < S, D, BLOCK_D)
        logits = dot(queries, tl.trans(keys)) * scale2
        attn = (zeta - gamma) * (tl.exp2(logits - top[:, None]) * inverse[:, None]) + gamma
        attn = tl.minimum(tl.maximum(attn, 0.0), 1.0)
        attn = tl.where((s < S)[None, :], attn, 0.0)
        values = load_rows(v, s, v_n, s < S, DV, BLOCK_DV)
        result = dot(attn.to(values.dtype), values, result)
    store_rows(out, n, out_n, n < N, result, DV, BLOCK_DV)


@triton.jit
def _probabilities(logits, top, inverse, valid, gamma, zeta):
    """Softmax, its clipped form, and how steep the clip is."""
    plain = tl.where(valid, tl.exp2(logits - top) * inverse, 0.0)
    stretched = (zeta - gamma) * plain + gamma
    inside = valid & (stretched >= 0.0) & (stretched <= 1.0)
    clipped = tl.where(valid, tl.minimum(tl.maximum(stretched, 0.0), 1.0), 0.0)
    return plain, clipped, tl.where(inside, zeta - gamma, 0.0)


@triton.jit
def _backward_q(
    q, k, v, dout, stats, sums, dq,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, dq_b, dq_h, dq_n,
    heads, N, S, scale, scale2, gamma, zeta,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_N)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    b, head = group // heads, group % heads
    q += b * q_b + head * q_h
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    dout += b * do_b + head * do_h
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    queries = load_rows(q, n, q_n, n < N, D, BLOCK_D)
    grads = load_rows(dout, n, do_n, n < N, DV, BLOCK_DV)
    top, inverse = load_stats(stats, group * N + n, n < N)

    row_sum = tl.zeros((BLOCK_N,), tl.float32)  # over keys, of probability times its gradient
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        keys = load_rows(k, s, k_n, s < S, D, BLOCK_D)
        values = load_rows(v, s, v_n, s < S, DV, BLOCK_DV)
        logits = dot(queries, tl.trans(keys)) * scale2
        plain, _, steep = _probabilities(logits, top[:, None], inverse[:, None], (s < S)[None, :], gamma, zeta)
        dattn = dot(grads, tl.trans(values)) * steep
        row_sum += tl.sum(plain * dattn, 1)
    tl.store(sums + group * N + n, row_sum, mask=n < N)

    result = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        keys = load_rows(k, s, k_n, s < S, D, BLOCK_D)
        values = load_rows(v, s, v_n, s < S, DV, BLOCK_DV)
        logits = dot(queries, tl.trans(keys)) * scale2
        plain, _, steep = _probabilities(logits, top[:, None], inverse[:, None], (s < S)[None, :], gamma, zeta)
        dattn = dot(grads, tl.trans(values)) * steep
        dlogits = plain * (dattn - row_sum[:, None])
        result = dot(dlogits.to(keys.dtype), keys, result)
    store_rows(dq + b * dq_b + head * dq_h, n, dq_n, n < N, result * scale, D, BLOCK_D)


@triton.jit
def _backward_kv(
    q, k, v, dout, stats, sums, dk, dv,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    heads, N, S, scale, scale2, gamma, zeta,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S, BLOCK_S)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    b, head = group // heads, group % heads
    q += b * q_b + head * q_h
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    dout += b * do_b + head * do_h
    s = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    keys = load_rows(k, s, k_n, s < S, D, BLOCK_D)
    values = load_rows(v, s, v_n, s < S, DV, BLOCK_DV)

    dkeys = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    dvalues = tl.zeros((BLOCK_S, BLOCK_DV), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        queries = load_rows(q, n, q_n, n < N, D, BLOCK_D)
        grads = load_rows(dout, n, do_n, n < N, DV, BLOCK_DV)
        top, inverse = load_stats(stats, group * N + n, n < N)
        row_sum = tl.load(sums + group * N + n, mask=n < N, other=0.0)
        logits = dot(keys, tl.trans(queries)) * scale2  # (keys, queries)
        plain, clipped, steep = _probabilities(logits, top[None, :], inverse[None, :], (n < N)[None, :], gamma, zeta)
        dvalues = dot(clipped.to(grads.dtype), grads, dvalues)
        dattn = dot(values, tl.trans(grads)) * steep
        dlogits = plain * (dattn - row_sum[None, :])
        dkeys = dot(dlogits.to(queries.dtype), queries, dkeys)
    store_rows(dk + b * dk_b + head * dk_h, s, dk_n, s < S, dkeys * scale, D, BLOCK_D)
    store_rows(dv + b * dv_b + head * dv_h, s, dv_n, s < S, dvalues, DV, BLOCK_DV)
