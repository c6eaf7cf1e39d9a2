"""Infinite self-attention: rectified scores with one normaliser a head, or keys pooled by one query.

Pure form: as the normaliser is one number a head, blocks of scores are squared, summed and multiplied by the values in
one pass over the keys, without a softmax; the division by the norm comes last. The backward pass computes scores again,
once by queries and once by keys.

Linear form: one pass over the queries sums them, weighted by their norms; one over keys and values scores and sums.
Backward: one pass over keys and values, which also sums the gradient of the mean query, then one over the queries. Many
programs share the tokens and sum in parts; nothing as long as the tokens is kept between passes.

Letters: B batch, h heads, N queries, S keys, d channels, dv channels of values.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels._blocks import attention_configs, block, dot, load_rows, split, store_rows
from visionattn.kernels._launch import Config, launch
from visionattn.kernels._layout import heads_last, rows

LARGEST = 32768  # of what the backward pass rounds to half precision


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor]:
    """The pure form without rho: ``(B, h, N, dv)``, and the norms of the scores ``(B, h)``."""
    q, k, v = rows(q), rows(k), rows(v)
    B, h, N, d = q.shape
    S, dv = v.shape[2:]
    weighted = heads_last(v, (B, h, N, dv), torch.float32)
    squares = q.new_zeros(B, h, triton.cdiv(N, 16), dtype=torch.float32)  # blocks hold 16 queries at least
    launch(
        _forward,
        lambda b: B * h * triton.cdiv(N, b["BLOCK_N"]),
        *(q, k, v, weighted, squares, *(s for x in (q, k, v, weighted) for s in x.stride()[:3])),
        *(h, N, S, squares.shape[2], scale),
        configs=attention_configs(q.dtype, max(d, dv), own="BLOCK_N", other="BLOCK_S"),
        RESCALE=q.dtype == torch.float16,
        **_widths(d, dv),
    )
    norm = squares.sum(dim=2).sqrt_()
    out = heads_last(v, (B, h, N, dv))
    torch.div(weighted, (norm + eps)[:, :, None, None], out=out)
    return out, norm


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, out: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in the pure form."""
    dout, q, k, v, out = rows(dout), rows(q), rows(k), rows(v), rows(out)
    B, h, N, d = q.shape
    S, dv = v.shape[2:]
    dq, dk, dvalues = (heads_last(x, x.shape) for x in (q, k, v))
    parts, chunk = split(B * h, N)
    slopes = norm.new_empty(parts, B, h)
    launch(
        _slopes,
        lambda b: B * h * parts,
        *(dout, out, slopes, *dout.stride()[:3], *out.stride()[:3], h, B * h, N, parts, chunk),
        configs=_configs(dv),
        DV=dv,
        BLOCK_DV=block(dv),
    )
    # Of each head: what a unit of score takes off by the norm, the division, and what lifts scores for half precision.
    shrink = torch.where(norm > 0, slopes.sum(dim=0) / norm, 0.0)
    lift = min(math.sqrt(N * S), LARGEST) / norm.clamp(min=1e-20)
    numbers = torch.stack([shrink, 1 / (norm + eps), lift], dim=-1)
    inputs = [s for x in (q, k, v, dout) for s in x.stride()[:3]]
    launch(
        _backward_q,
        lambda b: B * h * triton.cdiv(N, b["BLOCK_N"]),
        *(q, k, v, dout, numbers, dq, *inputs, *dq.stride()[:3], h, N, S, scale),
        configs=attention_configs(q.dtype, max(d, dv), own="BLOCK_N", other="BLOCK_S"),
        **_widths(d, dv),
    )
    launch(
        _backward_kv,
        lambda b: B * h * triton.cdiv(S, b["BLOCK_S"]),
        *(q, k, v, dout, numbers, dk, dvalues, *inputs, *dk.stride()[:3], *dvalues.stride()[:3], h, N, S, scale),
        configs=attention_configs(q.dtype, max(d, dv), own="BLOCK_S", other="BLOCK_N"),
        **_widths(d, dv),
    )
    return dq, dk, dvalues


def forward_linear(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The linear form without rho: ``(B, h, 1, dv)``; and what the backward pass needs.

    That is the scaled mean query ``(B, h, d)``, the sum of the queries' norms ``(B, h, 1)``, and the sums of scored
    values and of scores ``(B, h, dv + 1)``.
    """
    q, k, v = rows(q), rows(k), rows(v)
    B, h, N, d = q.shape
    S, dv = v.shape[2:]
    parts, chunk = split(B * h, N)
    partial = q.new_empty(parts, B, h, d + 1, dtype=torch.float32)
    launch(
        _pool_queries,
        lambda b: B * h * parts,
        *(q, partial, *q.stride()[:3], h, B * h, N, parts, chunk),
        configs=_configs(d),
        D=d,
        BLOCK_D=block(d),
    )
    pooled = partial.sum(dim=0)
    total = pooled[..., d:].contiguous()
    query = pooled[..., :d] * (_root(scale) / (total * math.sqrt(scale) + eps))
    parts, chunk = split(B * h, S)
    partial = q.new_empty(parts, B, h, dv + 1, dtype=torch.float32)
    launch(
        _pool_values,
        lambda b: B * h * parts,
        *(k, v, query, partial, *k.stride()[:3], *v.stride()[:3], h, B * h, S, parts, chunk),
        configs=_configs(max(d, dv)),
        **_widths(d, dv),
    )
    sums = partial.sum(dim=0)
    out = heads_last(v, (B, h, 1, dv)).copy_((sums[..., :dv] / (sums[..., dv:] + eps))[:, :, None])
    return out, query, total, sums


def backward_linear(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, query: Tensor, total: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in the linear form."""
    q, k, v = rows(q), rows(k), rows(v)
    B, h, N, d = q.shape
    S, dv = v.shape[2:]
    dq, dk, dvalues = (heads_last(x, x.shape) for x in (q, k, v))
    divisor = sums[..., dv:] + eps
    grad = (dout[:, :, 0].float() / divisor).contiguous()  # (B, h, dv), of the scored values
    along = (grad * sums[..., :dv]).sum(dim=-1) / divisor[..., 0]  # (B, h), what a score takes off by their sum
    parts, chunk = split(B * h, S)
    partial = q.new_empty(parts, B, h, d, dtype=torch.float32)
    launch(
        _backward_values,
        lambda b: B * h * parts,
        *(k, v, query, grad, along, partial, dk, dvalues),
        *(s for x in (k, v, dk, dvalues) for s in x.stride()[:3]),
        *(h, B * h, S, parts, chunk),
        configs=_configs(max(d, dv)),
        **_widths(d, dv),
    )
    dquery = partial.sum(dim=0)
    share = math.sqrt(scale) / (total * math.sqrt(scale) + eps)  # (B, h, 1)
    dpooled = dquery * (scale * share)
    dtotal = -(dquery * query).sum(dim=-1, keepdim=True) * share
    parts, chunk = split(B * h, N)
    launch(
        _backward_queries,
        lambda b: B * h * parts,
        *(q, dpooled, dtotal, dq, *q.stride()[:3], *dq.stride()[:3], h, N, parts, chunk),
        configs=_configs(d),
        D=d,
        BLOCK_D=block(d),
    )
    return dq, dk, dvalues


def _root(scale: float) -> float:
    return scale * math.sqrt(scale)


def _widths(d: int, dv: int) -> dict[str, int]:
    return {"D": d, "DV": dv, "BLOCK_D": block(d), "BLOCK_DV": block(dv)}


def _configs(width: int) -> list[Config]:
    """Of passes that multiply and add alone: 16 numbers of each operand in a thread."""
    return [Config({"BLOCK_N": 2048 // block(width)}, warps=4)]


@triton.jit
def _forward(
    q, k, v, weighted, squares,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, w_b, w_h, w_n,
    heads, N, S, width, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    RESCALE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_N)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    b, head = group // heads, group % heads
    q += b * q_b + head * q_h
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    queries = load_rows(q, n, q_n, n < N, D, BLOCK_D)

    square = tl.zeros((BLOCK_N,), tl.float32)
    top = tl.full((BLOCK_N,), 1e-30, tl.float32)  # largest score so far
    result = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        keys = load_rows(k, s, k_n, s < S, D, BLOCK_D)  # keys past the end are zero, and so are their scores
        values = load_rows(v, s, v_n, s < S, DV, BLOCK_DV)
        scores = tl.maximum(dot(queries, tl.trans(keys)) * scale, 0.0)
        square += tl.sum(scores * scores, 1)
        if RESCALE:  # fp16 ends at 65504
            new_top = tl.maximum(top, tl.max(scores, 1))
            scores /= new_top[:, None]
            result *= (top / new_top)[:, None]
            top = new_top
        result = dot(scores.to(values.dtype), values, result)
    if RESCALE:
        result *= top[:, None]
    tl.store(squares + group * width + tl.program_id(0) % blocks, tl.sum(square, 0))
    store_rows(weighted + b * w_b + head * w_h, n, w_n, n < N, result, DV, BLOCK_DV)


@triton.jit
def _slopes(
    dout, out, slopes,
    do_b, do_h, do_n, out_b, out_h, out_n,
    heads, groups, N, parts, chunk,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums of the output times its gradient, in parts."""
    group = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    dout += group // heads * do_b + group % heads * do_h
    out += group // heads * out_b + group % heads * out_h
    first, last = part * chunk, tl.minimum(part * chunk + chunk, N)
    total = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        grads = load_rows(dout, n, do_n, n < last, DV, BLOCK_DV)
        total += grads.to(tl.float32) * load_rows(out, n, out_n, n < last, DV, BLOCK_DV).to(tl.float32)
    tl.store(slopes + part * groups + group, tl.sum(tl.sum(total, 1), 0))


@triton.jit
def _backward_q(
    q, k, v, dout, numbers, dq,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, dq_b, dq_h, dq_n,
    heads, N, S, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_N)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    b, head = group // heads, group % heads
    q += b * q_b + head * q_h
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    shrink, share = tl.load(numbers + group * 3), tl.load(numbers + group * 3 + 1)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    queries = load_rows(q, n, q_n, n < N, D, BLOCK_D)
    grads = load_rows(dout + b * do_b + head * do_h, n, do_n, n < N, DV, BLOCK_DV)

    result = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, S, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        keys = load_rows(k, s, k_n, s < S, D, BLOCK_D)
        values = load_rows(v, s, v_n, s < S, DV, BLOCK_DV)
        scores = dot(queries, tl.trans(keys)) * scale
        dscores = tl.where(scores > 0.0, dot(grads, tl.trans(values)) - scores * shrink, 0.0)
        result = dot(dscores.to(keys.dtype), keys, result)
    store_rows(dq + b * dq_b + head * dq_h, n, dq_n, n < N, result * (scale * share), D, BLOCK_D)


@triton.jit
def _backward_kv(
    q, k, v, dout, numbers, dk, dv,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    heads, N, S, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S, BLOCK_S)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    b, head = group // heads, group % heads
    q += b * q_b + head * q_h
    dout += b * do_b + head * do_h
    shrink, share, lift = (
        tl.load(numbers + group * 3),
        tl.load(numbers + group * 3 + 1),
        tl.load(numbers + group * 3 + 2),
    )
    s = tl.program_id(0) % blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    keys = load_rows(k + b * k_b + head * k_h, s, k_n, s < S, D, BLOCK_D)
    values = load_rows(v + b * v_b + head * v_h, s, v_n, s < S, DV, BLOCK_DV)

    dkeys = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    dvalues = tl.zeros((BLOCK_S, BLOCK_DV), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        queries = load_rows(q, n, q_n, n < N, D, BLOCK_D)
        grads = load_rows(dout, n, do_n, n < N, DV, BLOCK_DV)
        scores = tl.maximum(dot(keys, tl.trans(queries)) * scale, 0.0)  # (keys, queries)
        dvalues = dot((scores * lift).to(grads.dtype), grads, dvalues)
        dscores = tl.where(scores > 0.0, dot(values, tl.trans(grads)) - scores * shrink, 0.0)
        dkeys = dot(dscores.to(queries.dtype), queries, dkeys)
    store_rows(dk + b * dk_b + head * dk_h, s, dk_n, s < S, dkeys * (scale * share), D, BLOCK_D)
    store_rows(dv + b * dv_b + head * dv_h, s, dv_n, s < S, dvalues * (share / lift), DV, BLOCK_DV)


@triton.jit
def _pool_queries(
    q, partial, q_b, q_h, q_n, heads, groups, N, parts, chunk,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums of queries times their norms ``(D,)``, then of the norms, in parts."""
    group = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    q += group // heads * q_b + group % heads * q_h
    first, last = part * chunk, tl.minimum(part * chunk + chunk, N)
    pooled = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        queries = load_rows(q, n, q_n, n < last, D, BLOCK_D).to(tl.float32)
        norm = tl.sqrt(tl.sum(queries * queries, 1))
        pooled += queries * norm[:, None]
        total += norm
    cols = tl.arange(0, BLOCK_D)
    partial += (part * groups + group) * (D + 1)
    tl.store(partial + cols, tl.sum(pooled, 0), mask=cols < D)
    tl.store(partial + D, tl.sum(total, 0))


@triton.jit
def _pool_values(
    k, v, query, partial,
    k_b, k_h, k_n, v_b, v_h, v_n,
    heads, groups, S, parts, chunk,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums of values times their scores ``(DV,)``, then of the scores, in parts."""
    group = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    k += group // heads * k_b + group % heads * k_h
    v += group // heads * v_b + group % heads * v_h
    first, last = part * chunk, tl.minimum(part * chunk + chunk, S)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    mean = tl.load(query + group * D + d, mask=d < D, other=0.0)
    pooled = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(first, last, BLOCK_N):
        s = start + tl.arange(0, BLOCK_N)
        keys = load_rows(k, s, k_n, s < last, D, BLOCK_D).to(tl.float32)
        values = load_rows(v, s, v_n, s < last, DV, BLOCK_DV).to(tl.float32)
        scores = tl.maximum(tl.sum(keys * mean[None, :], 1), 0.0)
        pooled += values * scores[:, None]
        total += scores
    partial += (part * groups + group) * (DV + 1)
    tl.store(partial + e, tl.sum(pooled, 0), mask=e < DV)
    tl.store(partial + DV, tl.sum(total, 0))


@triton.jit
def _backward_values(
    k, v, query, grad, along, partial, dk, dvalues,
    k_b, k_h, k_n, v_b, v_h, v_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    heads, groups, S, parts, chunk,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values, and that of the mean query in parts."""
    group = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    b, head = group // heads, group % heads
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    dk += b * dk_b + head * dk_h
    dvalues += b * dv_b + head * dv_h
    first, last = part * chunk, tl.minimum(part * chunk + chunk, S)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    mean = tl.load(query + group * D + d, mask=d < D, other=0.0)[None, :]
    grads = tl.load(grad + group * DV + e, mask=e < DV, other=0.0)[None, :]
    by_sum = tl.load(along + group)
    dquery = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(first, last, BLOCK_N):
        s = start + tl.arange(0, BLOCK_N)
        keys = load_rows(k, s, k_n, s < last, D, BLOCK_D).to(tl.float32)
        values = load_rows(v, s, v_n, s < last, DV, BLOCK_DV).to(tl.float32)
        scores = tl.maximum(tl.sum(keys * mean, 1), 0.0)
        dscores = tl.where(scores > 0.0, tl.sum(values * grads, 1) - by_sum, 0.0)
        dquery += keys * dscores[:, None]
        store_rows(dk, s, dk_n, s < last, dscores[:, None] * mean, D, BLOCK_D)
        store_rows(dvalues, s, dv_n, s < last, scores[:, None] * grads, DV, BLOCK_DV)
    tl.store(partial + (part * groups + group) * D + d, tl.sum(dquery, 0), mask=d < D)


@triton.jit
def _backward_queries(
    q, dpooled, dtotal, dq,
    q_b, q_h, q_n, dq_b, dq_h, dq_n,
    heads, N, parts, chunk,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    group = (tl.program_id(0) // parts).to(tl.int64)
    q += group // heads * q_b + group % heads * q_h
    dq += group // heads * dq_b + group % heads * dq_h
    first = tl.program_id(0) % parts * chunk
    last = tl.minimum(first + chunk, N)
    cols = tl.arange(0, BLOCK_D)
    grads = tl.load(dpooled + group * D + cols, mask=cols < D, other=0.0)[None, :]
    by_norm = tl.load(dtotal + group)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        queries = load_rows(q, n, q_n, n < last, D, BLOCK_D).to(tl.float32)
        norm = tl.sqrt(tl.sum(queries * queries, 1))
        dnorm = tl.sum(queries * grads, 1) + by_norm
        direction = queries / tl.where(norm > 0.0, norm, 1.0)[:, None]
        store_rows(dq, n, dq_n, n < last, norm[:, None] * grads + dnorm[:, None] * direction, D, BLOCK_D)
