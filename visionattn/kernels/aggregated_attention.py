"""Attention to the window around each token and to pooled tokens, in one softmax that is never written out.

A program holds a block of consecutive tokens. A cell of the window is then the same block of another part of the map,
met by products of channels; pooled tokens come in blocks of matrix products. One online softmax runs over both.

The backward pass computes the logits again. `_backward_q` passes over cells and pooled tokens twice, once for the sums
that the softmax's gradient subtracts (the weights added after the softmax would blur those of the output), once for the
gradients of queries, added weights and local biases. `_backward_kv` gathers, for each token, the queries that have it
in a cell, so nothing is scattered. `_backward_pool` sums over tokens and `_backward_bias` over the batch, each in
several parts.

Letters: B batch, h heads, N tokens, P pooled tokens, d channels, dv channels of values; logits are in units of log 2.
"""

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels._blocks import LOG2E, block, dot, load_rows, products, store_rows
from visionattn.kernels._launch import Config, launch
from visionattn.kernels._layout import heads_last, rows
from visionattn.kernels._softmax import online_softmax

PROGRAMS = 1024  # that share a sum over tokens or over the batch: several for each multiprocessor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attend: ``(B, h, H, W, dv)``, and the largest logits ``(B, h, N)`` for the backward pass."""
    B, h, H, W, _ = q.shape
    N = H * W
    maps, pools, tables, added = _inputs(q, k, v, k_pool, v_pool, bias_local, bias_pool, extra)
    out, tops = heads_last(v, (B, h, N, v.shape[-1])), q.new_empty(B, h, N, dtype=torch.float32)
    launch(
        _forward,
        lambda b: B * h * triton.cdiv(N, b["BLOCK_N"]),
        *(*maps, *pools, *tables, added, out, tops, *_strides(*maps, *pools, added, out)),
        *(*tables[1].stride()[:2], h, H, W, k_pool.shape[2]),
        configs=_configs(q.dtype, max(q.shape[-1], v.shape[-1])),
        **_constants(q, v, bias_local),
    )
    return out.unflatten(2, (H, W)), tops


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
    tops: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all inputs, in their order; an empty tensor for absent added weights."""
    B, h, H, W, d = q.shape
    N, P, dv = H * W, k_pool.shape[2], v.shape[-1]
    maps, pools, tables, added = _inputs(q, k, v, k_pool, v_pool, bias_local, bias_pool, extra)
    dout = rows(dout).flatten(2, 3)
    config = _configs(q.dtype, max(d, dv))[0]  # alone: sums over programs are laid out by its blocks
    constants = _constants(q, v, bias_local)
    blocks, pool_blocks = (triton.cdiv(n, config.blocks[name]) for n, name in ((N, "BLOCK_N"), (P, "BLOCK_P")))
    sums = tops.new_empty(B, h, N, 2)
    dq, dk, dvalues = (heads_last(x, x.shape) for x in maps)
    dadded = None if added is None else heads_last(added, added.shape)
    dlocal = q.new_empty(B, blocks, *bias_local.shape, dtype=torch.float32)
    launch(
        _backward_q,
        lambda b: B * h * blocks,
        *(*maps, *pools, *tables, dout, tops, sums, dq, dadded, dlocal),
        *_strides(*maps, *pools, dout, dq, dadded),
        *(*tables[1].stride()[:2], h, H, W, P),
        configs=[config],
        **constants,
    )
    launch(
        _backward_kv,
        lambda b: B * h * blocks,
        *(*maps, tables[0], added, dout, tops, sums, dk, dvalues),
        *(*_strides(*maps, added, dout, dk, dvalues), h, H, W),
        configs=[config],
        **constants,
    )
    splits = _splits(blocks, B * h * pool_blocks)
    dk_pool, dv_pool = (q.new_empty(splits, B, h, P, n, dtype=torch.float32) for n in (d, dv))
    launch(
        _backward_pool,
        lambda b: splits * B * h * pool_blocks,
        *(maps[0], *pools, tables[1], dout, tops, sums, dk_pool, dv_pool),
        *(*_strides(maps[0], *pools, dout), *tables[1].stride()[:2], B * h, h, N, P, splits),
        configs=[replace(config, warps=8) if q.dtype == torch.float32 and max(d, dv) > 64 else config],
        **constants,
    )
    batch_splits = _splits(B, h * blocks * pool_blocks)
    dpool = bias_pool.new_empty(batch_splits, h, N, P, dtype=bias_pool.dtype if batch_splits == 1 else torch.float32)
    launch(
        _backward_bias,
        lambda b: batch_splits * h * blocks * pool_blocks,
        *(maps[0], *pools, tables[1], dout, tops, sums, dpool),
        *(*_strides(maps[0], *pools, dout), *tables[1].stride()[:2], B, h, N, P, batch_splits),
        configs=[config],
        **constants,
    )
    return (
        dq.unflatten(2, (H, W)),
        dk.unflatten(2, (H, W)),
        dvalues.unflatten(2, (H, W)),
        dk_pool.sum(dim=0).to(k_pool.dtype),
        dv_pool.sum(dim=0).to(v_pool.dtype),
        dlocal.sum(dim=(0, 1)).to(bias_local.dtype),
        dpool[0] if batch_splits == 1 else dpool.sum(dim=0).to(bias_pool.dtype),
        q.new_empty(0) if dadded is None else dadded.unflatten(2, (H, W)),
    )


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor | None]:
    """Maps as ``(B, h, N, d)``, pooled tokens, biases and added weights; copied only where not evenly spaced."""
    maps = tuple(rows(x).flatten(2, 3) for x in (q, k, v))
    added = None if extra is None else rows(extra).flatten(2, 3)
    return maps, (rows(k_pool), rows(v_pool)), (bias_local.contiguous(), rows(bias_pool)), added


def _strides(*tensors: Tensor | None) -> list[int]:
    return [s for x in tensors for s in ((0, 0, 0) if x is None else x.stride()[:3])]


def _splits(length: int, programs: int) -> int:
    """Into how many parts a sum is cut that as many programs form: enough to fill a GPU, none of them empty."""
    parts = min(length, triton.cdiv(PROGRAMS, max(1, programs)))
    return triton.cdiv(length, triton.cdiv(length, parts)) if parts else 0


def _configs(dtype: torch.dtype, width: int) -> list[Config]:
    # The largest blocks that none of sm_80, sm_90, sm_100 and gfx942 spills registers at.
    if dtype == torch.float32:
        return [Config({"BLOCK_N": 32 if width <= 32 else 16, "BLOCK_P": 16}, warps=4, stages=1)]
    return [Config({"BLOCK_N": 32 if width <= 64 else 16, "BLOCK_P": 32}, warps=4)]


def _constants(q: Tensor, v: Tensor, bias_local: Tensor) -> dict[str, int]:
    d, dv = q.shape[-1], v.shape[-1]
    return {"D": d, "DV": dv, "BLOCK_D": block(d), "BLOCK_DV": block(dv), "WINDOW": math.isqrt(bias_local.shape[1])}


TO_LOG2 = tl.constexpr(LOG2E)
LOWEST = tl.constexpr(-3.0e38)  # below every logit, and finite: a cell may lie outside the map


@triton.jit
def _cell(n, dy, dx, H, W):
    """The tokens ``dy`` rows below and ``dx`` columns right of tokens ``n``, and whether they lie on the map."""
    y, x = n // W + dy, n % W + dx
    return n + dy * W + dx, (n < H * W) & (y >= 0) & (y < H) & (x >= 0) & (x < W)


@triton.jit
def _pooled_logits(products, bias_pool, n, n_stride, N, p, P):
    """Logits of queries ``n`` and pooled tokens ``p``, shaped like rows and columns of the products."""
    valid = (n < N) & (p < P)
    bias = tl.load(bias_pool + n.to(tl.int64) * n_stride + p, mask=valid, other=0.0).to(tl.float32)
    return tl.where(p < P, (products + bias) * TO_LOG2, float("-inf"))


@triton.jit
def _row(tops, sums, at, valid):
    """Of queries: the largest logit, the inverse sum of exponentials, the sum that the softmax's gradient subtracts."""
    top = tl.load(tops + at, mask=valid, other=0.0)
    return top, tl.load(sums + 2 * at, mask=valid, other=0.0), tl.load(sums + 2 * at + 1, mask=valid, other=0.0)


@triton.jit
def _forward(
    q, k, v, k_pool, v_pool, bias_local, bias_pool, extra, out, tops,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, kp_b, kp_h, kp_n, vp_b, vp_h, vp_n, e_b, e_h, e_n, out_b, out_h, out_n,
    bias_h, bias_n, heads, H, W, P,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    N = H * W
    blocks = tl.cdiv(N, BLOCK_N)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    b, head = group // heads, group % heads
    q += b * q_b + head * q_h
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    k_pool += b * kp_b + head * kp_h
    v_pool += b * vp_b + head * vp_h
    bias_local += head * (WINDOW * WINDOW)
    bias_pool += head * bias_h
    if extra is not None:
        extra += b * e_b + head * e_h
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    queries = load_rows(q, n, q_n, n < N, D, BLOCK_D)
    wide = queries.to(tl.float32)

    top = tl.full((BLOCK_N,), LOWEST, tl.float32)  # largest logit so far
    total = tl.zeros((BLOCK_N,), tl.float32)  # sum of exponentials, relative to it
    result = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    if extra is not None:
        addend = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for row in range(WINDOW):
        for col in tl.static_range(WINDOW):
            s, inside = _cell(n, row - WINDOW // 2, col - WINDOW // 2, H, W)
            keys = load_rows(k, s, k_n, inside, D, BLOCK_D).to(tl.float32)
            values = load_rows(v, s, v_n, inside, DV, BLOCK_DV).to(tl.float32)
            bias = tl.load(bias_local + row * WINDOW + col).to(tl.float32)
            logits = tl.where(inside, (tl.sum(wide * keys, 1) + bias) * TO_LOG2, float("-inf"))
            new_top = tl.maximum(top, logits)
            attn, shrink = tl.exp2(logits - new_top), tl.exp2(top - new_top)
            total = total * shrink + attn
            result = result * shrink[:, None] + attn[:, None] * values
            top = new_top
            if extra is not None:
                at = extra + n.to(tl.int64) * e_n + row * WINDOW + col
                addend += tl.load(at, mask=inside, other=0.0).to(tl.float32)[:, None] * values

    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        keys = load_rows(k_pool, p, kp_n, p < P, D, BLOCK_D)
        values = load_rows(v_pool, p, vp_n, p < P, DV, BLOCK_DV)
        logits = _pooled_logits(dot(queries, tl.trans(keys)), bias_pool, n[:, None], bias_n, N, p[None, :], P)
        attn, shrink, top, total = online_softmax(logits, top, total)
        result = dot(attn.to(values.dtype), values, result * shrink[:, None])
    tl.store(tops + group * N + n, top, mask=n < N)
    result /= total[:, None]
    if extra is not None:
        result += addend
    store_rows(out + b * out_b + head * out_h, n, out_n, n < N, result, DV, BLOCK_DV)


@triton.jit
def _backward_q(
    q, k, v, k_pool, v_pool, bias_local, bias_pool, dout, tops, sums, dq, dextra, dlocal,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, kp_b, kp_h, kp_n, vp_b, vp_h, vp_n,
    do_b, do_h, do_n, dq_b, dq_h, dq_n, de_b, de_h, de_n,
    bias_h, bias_n, heads, H, W, P,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    N = H * W
    blocks = tl.cdiv(N, BLOCK_N)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    b, head = group // heads, group % heads
    q += b * q_b + head * q_h
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    k_pool += b * kp_b + head * kp_h
    v_pool += b * vp_b + head * vp_h
    dout += b * do_b + head * do_h
    bias_local += head * (WINDOW * WINDOW)
    bias_pool += head * bias_h
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    n_at = n.to(tl.int64)
    queries = load_rows(q, n, q_n, n < N, D, BLOCK_D)
    grads = load_rows(dout, n, do_n, n < N, DV, BLOCK_DV)
    top = tl.load(tops + group * N + n, mask=n < N, other=0.0)

    CELLS: tl.constexpr = triton.next_power_of_2(WINDOW * WINDOW)
    cells = tl.arange(0, CELLS)
    attn_local = tl.zeros((BLOCK_N, CELLS), tl.float32)
    dattn_local = tl.zeros((BLOCK_N, CELLS), tl.float32)
    for row in range(WINDOW):
        for col in tl.static_range(WINDOW):
            s, inside = _cell(n, row - WINDOW // 2, col - WINDOW // 2, H, W)
            keys = load_rows(k, s, k_n, inside, D, BLOCK_D).to(tl.float32)
            values = load_rows(v, s, v_n, inside, DV, BLOCK_DV).to(tl.float32)
            bias = tl.load(bias_local + row * WINDOW + col).to(tl.float32)
            logits = (tl.sum(queries.to(tl.float32) * keys, 1) + bias) * TO_LOG2
            attn = tl.where(inside, tl.exp2(logits - top), 0.0)
            dattn = tl.sum(grads.to(tl.float32) * values, 1)
            here = (cells == row * WINDOW + col)[None, :]
            attn_local = tl.where(here, attn[:, None], attn_local)
            dattn_local = tl.where(here, dattn[:, None], dattn_local)
    real = (n < N)[:, None] & (cells < WINDOW * WINDOW)[None, :]
    if dextra is not None:
        at = b * de_b + head * de_h + n.to(tl.int64)[:, None] * de_n + cells[None, :]
        tl.store(dextra + at, dattn_local.to(dextra.dtype.element_ty), mask=real)

    row_sum = tl.sum(attn_local * dattn_local, 1)  # over keys, of weight times its gradient
    total = tl.sum(attn_local, 1)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        p_at = p.to(tl.int64)
        keys = load_rows(k_pool, p, kp_n, p < P, D, BLOCK_D)
        values = load_rows(v_pool, p, vp_n, p < P, DV, BLOCK_DV)
        match = products(queries, keys, q, n_at * q_n, n < N, k_pool, p_at * kp_n, p < P, D, BLOCK_D)
        logits = _pooled_logits(match, bias_pool, n[:, None], bias_n, N, p[None, :], P)
        attn = tl.exp2(logits - top[:, None])
        dattn = products(grads, values, dout, n_at * do_n, n < N, v_pool, p_at * vp_n, p < P, DV, BLOCK_DV)
        row_sum += tl.sum(attn * dattn, 1)
        total += tl.sum(attn, 1)
    # Of the weights as they are here, so that the gradients of a query's logits sum to zero as they should.
    inverse = 1.0 / total
    row_sum *= inverse
    tl.store(sums + 2 * (group * N + n), inverse, mask=n < N)
    tl.store(sums + 2 * (group * N + n) + 1, row_sum, mask=n < N)

    dlogits_local = attn_local * inverse[:, None] * (dattn_local - row_sum[:, None])
    at = ((b * blocks + tl.program_id(0) % blocks) * heads + head) * (WINDOW * WINDOW) + cells
    tl.store(dlocal + at, tl.sum(dlogits_local, 0), mask=cells < WINDOW * WINDOW)
    result = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for row in range(WINDOW):
        for col in tl.static_range(WINDOW):
            s, inside = _cell(n, row - WINDOW // 2, col - WINDOW // 2, H, W)
            keys = load_rows(k, s, k_n, inside, D, BLOCK_D).to(tl.float32)
            here = (cells == row * WINDOW + col)[None, :]
            result += tl.sum(tl.where(here, dlogits_local, 0.0), 1)[:, None] * keys
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        p_at = p.to(tl.int64)
        keys = load_rows(k_pool, p, kp_n, p < P, D, BLOCK_D)
        values = load_rows(v_pool, p, vp_n, p < P, DV, BLOCK_DV)
        match = products(queries, keys, q, n_at * q_n, n < N, k_pool, p_at * kp_n, p < P, D, BLOCK_D)
        logits = _pooled_logits(match, bias_pool, n[:, None], bias_n, N, p[None, :], P)
        attn = tl.exp2(logits - top[:, None]) * inverse[:, None]
        dattn = products(grads, values, dout, n_at * do_n, n < N, v_pool, p_at * vp_n, p < P, DV, BLOCK_DV)
        dlogits = attn * (dattn - row_sum[:, None])
        result = dot(dlogits.to(keys.dtype), keys, result)
    store_rows(dq + b * dq_b + head * dq_h, n, dq_n, n < N, result, D, BLOCK_D)


@triton.jit
def _backward_kv(
    q, k, v, bias_local, extra, dout, tops, sums, dk, dv,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, e_b, e_h, e_n,
    do_b, do_h, do_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    heads, H, W,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    N = H * W
    blocks = tl.cdiv(N, BLOCK_N)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    b, head = group // heads, group % heads
    q += b * q_b + head * q_h
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    dout += b * do_b + head * do_h
    bias_local += head * (WINDOW * WINDOW)
    if extra is not None:
        extra += b * e_b + head * e_h
    s = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = load_rows(k, s, k_n, s < N, D, BLOCK_D).to(tl.float32)
    values = load_rows(v, s, v_n, s < N, DV, BLOCK_DV).to(tl.float32)

    dkeys = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dvalues = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for row in range(WINDOW):
        for col in tl.static_range(WINDOW):
            n, inside = _cell(s, WINDOW // 2 - row, WINDOW // 2 - col, H, W)  # the query that has s in this cell
            queries = load_rows(q, n, q_n, inside, D, BLOCK_D).to(tl.float32)
            grads = load_rows(dout, n, do_n, inside, DV, BLOCK_DV).to(tl.float32)
            top, inverse, row_sum = _row(tops, sums, group * N + n, inside)
            bias = tl.load(bias_local + row * WINDOW + col).to(tl.float32)
            logits = (tl.sum(queries * keys, 1) + bias) * TO_LOG2
            attn = tl.where(inside, tl.exp2(logits - top) * inverse, 0.0)
            dlogits = attn * (tl.sum(grads * values, 1) - row_sum)
            dkeys += dlogits[:, None] * queries
            if extra is not None:
                at = extra + n.to(tl.int64) * e_n + row * WINDOW + col
                attn += tl.load(at, mask=inside, other=0.0).to(tl.float32)
            dvalues += attn[:, None] * grads
    store_rows(dk + b * dk_b + head * dk_h, s, dk_n, s < N, dkeys, D, BLOCK_D)
    store_rows(dv + b * dv_b + head * dv_h, s, dv_n, s < N, dvalues, DV, BLOCK_DV)


@triton.jit
def _backward_pool(
    q, k_pool, v_pool, bias_pool, dout, tops, sums, dk_pool, dv_pool,
    q_b, q_h, q_n, kp_b, kp_h, kp_n, vp_b, vp_h, vp_n, do_b, do_h, do_n,
    bias_h, bias_n, groups, heads, N, P, splits,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    pool_blocks = tl.cdiv(P, BLOCK_P)
    group = (tl.program_id(0) // pool_blocks % groups).to(tl.int64)
    split = tl.program_id(0) // pool_blocks // groups
    b, head = group // heads, group % heads
    q += b * q_b + head * q_h
    k_pool += b * kp_b + head * kp_h
    v_pool += b * vp_b + head * vp_h
    dout += b * do_b + head * do_h
    bias_pool += head * bias_h
    p = tl.program_id(0) % pool_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    keys = load_rows(k_pool, p, kp_n, p < P, D, BLOCK_D)
    values = load_rows(v_pool, p, vp_n, p < P, DV, BLOCK_DV)

    dkeys = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    dvalues = tl.zeros((BLOCK_P, BLOCK_DV), tl.float32)
    share = tl.cdiv(tl.cdiv(N, BLOCK_N), splits) * BLOCK_N
    for start in range(split * share, tl.minimum((split + 1) * share, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        queries = load_rows(q, n, q_n, n < N, D, BLOCK_D)
        grads = load_rows(dout, n, do_n, n < N, DV, BLOCK_DV)
        top, inverse, row_sum = _row(tops, sums, group * N + n, n < N)
        logits = _pooled_logits(dot(keys, tl.trans(queries)), bias_pool, n[None, :], bias_n, N, p[:, None], P)
        attn = tl.exp2(logits - top[None, :]) * inverse[None, :]  # (pooled tokens, queries)
        dvalues = dot(attn.to(grads.dtype), grads, dvalues)
        dlogits = attn * (dot(values, tl.trans(grads)) - row_sum[None, :])
        dkeys = dot(dlogits.to(queries.dtype), queries, dkeys)
    part = (split * groups + group) * P
    store_rows(dk_pool + part * D, p, D, p < P, dkeys, D, BLOCK_D)
    store_rows(dv_pool + part * DV, p, DV, p < P, dvalues, DV, BLOCK_DV)


@triton.jit
def _backward_bias(
    q, k_pool, v_pool, bias_pool, dout, tops, sums, dbias,
    q_b, q_h, q_n, kp_b, kp_h, kp_n, vp_b, vp_h, vp_n, do_b, do_h, do_n,
    bias_h, bias_n, B, heads, N, P, splits,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    blocks, pool_blocks = tl.cdiv(N, BLOCK_N), tl.cdiv(P, BLOCK_P)
    part = tl.program_id(0) // (blocks * pool_blocks)
    head, split = (part % heads).to(tl.int64), part // heads
    n = tl.program_id(0) // pool_blocks % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    p = tl.program_id(0) % pool_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    bias = _pooled_logits(0.0, bias_pool + head * bias_h, n[:, None], bias_n, N, p[None, :], P)

    result = tl.zeros((BLOCK_N, BLOCK_P), tl.float32)
    n_at, p_at = n.to(tl.int64), p.to(tl.int64)
    share = tl.cdiv(B, splits)
    for item in range(split * share, tl.minimum((split + 1) * share, B)):
        b = tl.cast(item, tl.int64)
        q_at, k_at = q + b * q_b + head * q_h, k_pool + b * kp_b + head * kp_h
        queries = load_rows(q_at, n, q_n, n < N, D, BLOCK_D)
        keys = load_rows(k_at, p, kp_n, p < P, D, BLOCK_D)
        top, inverse, row_sum = _row(tops, sums, (b * heads + head) * N + n, n < N)
        match = products(queries, keys, q_at, n_at * q_n, n < N, k_at, p_at * kp_n, p < P, D, BLOCK_D)
        attn = tl.exp2(match * TO_LOG2 + bias - top[:, None]) * inverse[:, None]
        do_at, v_at = dout + b * do_b + head * do_h, v_pool + b * vp_b + head * vp_h
        grads = load_rows(do_at, n, do_n, n < N, DV, BLOCK_DV)
        values = load_rows(v_at, p, vp_n, p < P, DV, BLOCK_DV)
        dattn = products(grads, values, do_at, n_at * do_n, n < N, v_at, p_at * vp_n, p < P, DV, BLOCK_DV)
        result += attn * (dattn - row_sum[:, None])
    dbias += ((split * heads + head) * N + n)[:, None] * P + p[None, :]
    tl.store(dbias, result.to(dbias.dtype.element_ty), mask=(n < N)[:, None] & (p < P)[None, :])
