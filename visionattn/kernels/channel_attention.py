"""Attention among channels: a d x d softmax whose logits are sums over all tokens.

Each pass reads tokens where they lie and once: queries and keys for the logits, then values for the result. Backward:
values with the result's gradient, for the gradients of both the values and the d x d weights; then queries with keys.
Sums over tokens are taken in splits of the token axis, whose d x d partial sums a small kernel adds up row by row.

Letters: B batch, g groups, N tokens, d channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels._blocks import block, dot, load_rows, store_rows
from visionattn.kernels._launch import Config, launch
from visionattn.kernels._layout import heads_last, rows

PROGRAMS = 512  # that sums over tokens are shared by, where there are tokens enough: a few on each processor of a GPU
LEAST = 128  # tokens of a split


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend: ``(B, g, N, d)``, and the weights ``(B, g, d, d)`` in fp32 for the backward pass."""
    q, k, v = rows(q), rows(k), rows(v)
    B, g, N, d = q.shape
    sums, per_split = _partial_sums(q)
    weights, out = q.new_empty(B, g, d, d, dtype=torch.float32), heads_last(v, v.shape)
    launch(
        _logits,
        lambda b: sums.shape[0] * sums.shape[1],
        *(q, k, sums, *q.stride()[:3], *k.stride()[:3], g, N, per_split, sums.shape[1]),
        configs=_configs(q.dtype, d),
        **_widths(d),
    )
    launch(_softmax, lambda b: B * g * d, sums, weights, sums.shape[1], scale, configs=SMALL, **_widths(d))
    launch(
        _mix,
        lambda b: B * g * triton.cdiv(N, b["BLOCK_N"]),
        *(v, weights, out, *v.stride()[:3], *out.stride()[:3], g, N),
        configs=_configs(q.dtype, d),
        **_widths(d),
    )
    return out, weights


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    dout, q, k, v = rows(dout), rows(q), rows(k), rows(v)
    B, g, N, d = q.shape
    dq, dk, dv = (heads_last(x, x.shape) for x in (q, k, v))
    sums, per_split = _partial_sums(q)
    dlogits = torch.empty_like(weights)
    launch(
        _backward_v,
        lambda b: sums.shape[0] * sums.shape[1],
        *(v, dout, weights, sums, dv, *(s for x in (v, dout, dv) for s in x.stride()[:3])),
        *(g, N, per_split, sums.shape[1]),
        configs=_configs(q.dtype, d),
        **_widths(d),
    )
    launch(
        _backward_softmax,
        lambda b: B * g * d,
        *(sums, weights, dlogits, sums.shape[1], scale),
        configs=SMALL,
        **_widths(d),
    )
    launch(
        _backward_qk,
        lambda b: B * g * triton.cdiv(N, b["BLOCK_N"]),
        *(q, k, dlogits, dq, dk, *(s for x in (q, k, dq, dk) for s in x.stride()[:3]), g, N),
        configs=_configs(q.dtype, d),
        **_widths(d),
    )
    return dq, dk, dv


SMALL = (Config({"SPLITS": 32}, warps=1, stages=1),)


def _configs(dtype: torch.dtype, d: int) -> list[Config]:
    warps = 4 if d <= 32 else 8
    if dtype == torch.float32:
        return [Config({"BLOCK_N": 32}, warps, stages=1)]
    return [Config({"BLOCK_N": 64}, warps)]


def _widths(d: int) -> dict[str, int]:
    return {"D": d, "BLOCK_D": block(d)}


def _partial_sums(q: Tensor) -> tuple[Tensor, int]:
    """Fresh ``(B * g, splits, d, d)`` in fp32, and the tokens of a split."""
    B, g, N, d = q.shape
    splits = max(1, min(PROGRAMS // max(1, B * g), triton.cdiv(N, LEAST)))
    per_split = triton.cdiv(triton.cdiv(N, splits), 64) * 64
    splits = max(1, triton.cdiv(N, max(1, per_split)))
    return q.new_empty(B * g, splits, d, d, dtype=torch.float32), per_split


@triton.jit
def _logits(
    q, k, sums,
    q_b, q_g, q_n, k_b, k_g, k_n,
    groups, N, per_split, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    group, first = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits * per_split
    b, g = group // groups, group % groups
    q += b * q_b + g * q_g
    k += b * k_b + g * k_g
    end = tl.minimum(first + per_split, N)
    result = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    for start in range(first, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        queries = load_rows(q, n, q_n, n < end, D, BLOCK_D)
        keys = load_rows(k, n, k_n, n < end, D, BLOCK_D)
        result = dot(tl.trans(queries), keys, result)
    i = tl.arange(0, BLOCK_D)
    store_rows(sums + tl.program_id(0).to(tl.int64) * D * D, i, D, i < D, result, D, BLOCK_D)


@triton.jit
def _add_splits(sums, row, splits, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr):
    """Sum over splits of one row of a group's matrix, ``row`` counted over all groups: ``(BLOCK_D,)``."""
    sums += row // D * splits * D * D + row % D * D
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, splits, SPLITS):
        s = start + tl.arange(0, SPLITS)
        total += tl.sum(load_rows(sums, s, D * D, s < splits, D, BLOCK_D), 0)
    return total


@triton.jit
def _softmax(
    sums, weights, splits, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    row, j = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    logits = tl.where(j < D, _add_splits(sums, row, splits, D, BLOCK_D, SPLITS) * scale, float("-inf"))
    attn = tl.exp(logits - tl.max(logits, 0))
    tl.store(weights + row * D + j, attn / tl.sum(attn, 0), mask=j < D)


@triton.jit
def _mix(
    v, weights, out,
    v_b, v_g, v_n, out_b, out_g, out_n,
    groups, N,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_N)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    b, g = group // groups, group % groups
    n, i = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    values = load_rows(v + b * v_b + g * v_g, n, v_n, n < N, D, BLOCK_D)
    attn = load_rows(weights + group * D * D, i, D, i < D, D, BLOCK_D).to(values.dtype)
    store_rows(out + b * out_b + g * out_g, n, out_n, n < N, dot(values, tl.trans(attn)), D, BLOCK_D)


@triton.jit
def _backward_v(
    v, dout, weights, sums, dv,
    v_b, v_g, v_n, do_b, do_g, do_n, dv_b, dv_g, dv_n,
    groups, N, per_split, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    group, first = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits * per_split
    b, g = group // groups, group % groups
    v += b * v_b + g * v_g
    dout += b * do_b + g * do_g
    dv += b * dv_b + g * dv_g
    i, end = tl.arange(0, BLOCK_D), tl.minimum(first + per_split, N)
    attn = load_rows(weights + group * D * D, i, D, i < D, D, BLOCK_D).to(v.dtype.element_ty)
    result = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)  # gradient of the weights
    for start in range(first, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        values = load_rows(v, n, v_n, n < end, D, BLOCK_D)
        grads = load_rows(dout, n, do_n, n < end, D, BLOCK_D)
        result = dot(tl.trans(grads), values, result)
        store_rows(dv, n, dv_n, n < end, dot(grads, attn), D, BLOCK_D)
    store_rows(sums + tl.program_id(0).to(tl.int64) * D * D, i, D, i < D, result, D, BLOCK_D)


@triton.jit
def _backward_softmax(
    sums, weights, dlogits, splits, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    row, j = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    dattn = _add_splits(sums, row, splits, D, BLOCK_D, SPLITS)
    attn = tl.load(weights + row * D + j, mask=j < D, other=0.0)
    tl.store(dlogits + row * D + j, attn * (dattn - tl.sum(attn * dattn, 0)) * scale, mask=j < D)


@triton.jit
def _backward_qk(
    q, k, dlogits, dq, dk,
    q_b, q_g, q_n, k_b, k_g, k_n, dq_b, dq_g, dq_n, dk_b, dk_g, dk_n,
    groups, N,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_N)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    b, g = group // groups, group % groups
    n, i = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    queries = load_rows(q + b * q_b + g * q_g, n, q_n, n < N, D, BLOCK_D)
    keys = load_rows(k + b * k_b + g * k_g, n, k_n, n < N, D, BLOCK_D)
    change = load_rows(dlogits + group * D * D, i, D, i < D, D, BLOCK_D).to(keys.dtype)
    store_rows(dq + b * dq_b + g * dq_g, n, dq_n, n < N, dot(keys, tl.trans(change)), D, BLOCK_D)
    store_rows(dk + b * dk_b + g * dk_g, n, dk_n, n < N, dot(queries, change), D, BLOCK_D)
