"""Linear attention: a state of keys times values, read by every query; nothing between the tokens is formed.

Forward: one pass over keys and values sums the state, the keys and the values in parts, one over the queries multiplies
and normalises. Backward: one pass over queries and output gradients gives the gradient of the queries and sums that of
the state in parts, one over keys and values gives theirs. Each pass reads its tokens once; sums that are as small as
the state are all that goes from one pass to the next. Rotations happen in registers.

Sums are in fp32. Products with fp32 operands (the state, rotated or weighted rows) keep them: in three passes of tensor
cores for fp32 inputs, and for half precision as pairs of bf16 numbers, 16 bits of mantissa.

Letters: B batch, h heads, N queries, M keys, d channels, dv channels of values. The sums of a head lie in one row:
state (d, dv), keys (d), values (dv). Wide heads are taken in slices of the values' channels.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels._blocks import block, dot, load_rows, split, store_rows
from visionattn.kernels._launch import Config, launch
from visionattn.kernels._layout import heads_last, rows

STATE = 64 * 32  # numbers of the state that a program holds; twice as many in half precision


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    normalization: str,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Attend: ``(B, h, N, dv)``, and the sums ``(B, h, d * dv + d + dv)`` for the backward pass."""
    q, k, v = rows(q), rows(k), rows(v)
    B, h, N, d = q.shape
    M, dv = v.shape[2:]
    out = heads_last(v, (B, h, N, dv))
    rope = _tables(cos, sin)
    parts, chunk = split(B * h, M)
    partial = v.new_empty(parts, B, h, d * dv + d + dv, dtype=torch.float32)
    configs = _configs(q.dtype, d)
    if rope[0] is not None and d <= 32:  # with two stages, sm_80 and sm_100 spill 12 bytes
        configs = [replace(c, stages=1) for c in configs]
    for values, column, constants in _slices(q, v, normalization, rope):
        launch(
            _sum_keys,
            lambda b: B * h * parts,
            *(k, values, *rope, partial, *k.stride()[:3], *v.stride()[:3], h, B * h, M, parts, chunk, dv, column),
            configs=configs,
            **constants,
        )
    sums = _total(partial)
    parts, chunk = split(B * h, N)
    for _, column, constants in _slices(q, v, normalization, rope):
        launch(
            _attend,
            lambda b: B * h * parts,
            *(q, *rope, sums, out[..., column:], *q.stride()[:3], *out.stride()[:3]),
            *(h, N, M, parts, chunk, dv, column, scale / M, eps),
            configs=_configs(q.dtype, d, wide=d > 64),
            **constants,
        )
    return out, sums


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    normalization: str,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    eps: float,
    sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    dout, q, k, v = rows(dout), rows(q), rows(k), rows(v)
    B, h, N, d = q.shape
    M, dv = v.shape[2:]
    rope = _tables(cos, sin)
    slices = list(_slices(q, v, normalization, rope))
    dq, dk = _Slices(q, len(slices)), _Slices(k, len(slices))
    dvalues = heads_last(v, v.shape)
    parts, chunk = split(B * h, N)
    # The gradient of the keys' sum is itself a sum over slices, each of which leaves the others' columns zero.
    partial = (v.new_empty if len(slices) == 1 else v.new_zeros)(
        (len(slices), parts, B, h, sums.shape[-1]), dtype=torch.float32
    )
    for i, (_, column, constants) in enumerate(slices):
        launch(
            _backward_q,
            lambda b: B * h * parts,
            *(q, *rope, dout[..., column:], sums, dq[i], partial[i]),
            *(*q.stride()[:3], *dout.stride()[:3], *dq[i].stride()[:3]),
            *(h, B * h, N, M, parts, chunk, dv, column, scale / M, eps),
            configs=_configs(q.dtype, d, wide=True),
            **constants,
        )
    dsums = _total(partial.flatten(0, 1))
    parts, chunk = split(B * h, M)
    for i, (values, column, constants) in enumerate(slices):
        launch(
            _backward_kv,
            lambda b: B * h * parts,
            *(k, values, *rope, sums, dsums, dk[i], dvalues[..., column:]),
            *(*k.stride()[:3], *v.stride()[:3], *dk[i].stride()[:3], *dvalues.stride()[:3]),
            *(h, M, parts, chunk, dv, column, scale / M),
            configs=_configs(q.dtype, d, wide=d > 64),
            **constants,
        )
    return dq.total(), dk.total(), dvalues


class _Slices:
    """Gradients of ``x``, one for each slice of the values' channels; their sum is the gradient."""

    def __init__(self, x: Tensor, count: int) -> None:
        self.grad = heads_last(x, x.shape)
        many = count > 1
        self.parts = [x.new_empty(x.shape, dtype=torch.float32) for _ in range(count)] if many else [self.grad]

    def __getitem__(self, i: int) -> Tensor:
        return self.parts[i]

    def total(self) -> Tensor:
        if len(self.parts) > 1:
            self.grad.copy_(torch.stack(self.parts).sum(dim=0))
        return self.grad


def _slices(
    q: Tensor, v: Tensor, normalization: str, rope: tuple[Tensor | None, ...]
) -> Iterator[tuple[Tensor, int, dict[str, Any]]]:
    """Slices of the values' channels with which the state fits, their first channels, and constants of the kernels."""
    d, dv = q.shape[-1], v.shape[-1]
    width = min(max(STATE * (1 if q.dtype == torch.float32 else 2) // block(d), 16), block(dv))
    for column in range(0, dv, width):
        part = v[..., column : column + width]
        yield (
            part,
            column,
            {
                "D": d,
                "DV": part.shape[-1],
                "BLOCK_D": block(d),
                "BLOCK_DV": width,
                "KIND": normalization,
                "ROPE": rope[0] is not None,
                "HALF": q.dtype != torch.float32,
            },
        )


def _tables(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if cos is None or sin is None else (cos.contiguous(), sin.contiguous())


def _total(partial: Tensor) -> Tensor:
    return partial[0] if partial.shape[0] == 1 else partial.sum(dim=0)


def _configs(dtype: torch.dtype, d: int, *, wide: bool = False) -> list[Config]:
    """Blocks that none of sm_80, sm_90, sm_100 and gfx942 spills registers at; ``wide`` is for the backward pass over
    queries, whose products share a layout that repeats rows over the warps, and for wide heads. Hopper's matrix units
    start at 64 rows."""
    if dtype == torch.float32:
        return [Config({"BLOCK_N": 16}, warps=8 if wide and d > 64 else 4, stages=1)]
    if wide and d > 32:
        return [Config({"BLOCK_N": 16}, warps=8, stages=1), Config({"BLOCK_N": 64}, warps=4, stages=1)]
    return [Config({"BLOCK_N": 32}, warps=4), Config({"BLOCK_N": 64}, warps=4)]


@triton.jit
def _product(a, b, acc, HALF: tl.constexpr):
    """``a @ b + acc``; fp32 operands are not rounded to half precision, if HALF to pairs of bf16 numbers."""
    if a.dtype == b.dtype and (a.dtype != tl.float32 or not HALF):
        return dot(a, b, acc)
    if a.dtype == tl.float16:
        a = a.to(tl.float32)
    if b.dtype == tl.float16:
        b = b.to(tl.float32)
    a_high, b_high = a.to(tl.bfloat16), b.to(tl.bfloat16)
    if b.dtype == tl.float32:
        acc = dot(a_high, (b - b_high.to(tl.float32)).to(tl.bfloat16), acc)
    if a.dtype == tl.float32:
        acc = dot((a - a_high.to(tl.float32)).to(tl.bfloat16), b_high, acc)
    return dot(a_high, b_high, acc)


@triton.jit
def _rotate(x, cos, sin, n, valid, SIGN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Turn the channel pairs of rows ``n``, ``x (n, BLOCK_D)``, by the angles of the tables times SIGN; fp32."""
    c = load_rows(cos, n, D // 2, valid, D // 2, BLOCK_D // 2).to(tl.float32)
    s = load_rows(sin, n, D // 2, valid, D // 2, BLOCK_D // 2).to(tl.float32) * SIGN
    a, b = tl.split(tl.reshape(x.to(tl.float32), (n.shape[0], BLOCK_D // 2, 2)))
    return tl.reshape(tl.join(a * c - b * s, b * c + a * s), (n.shape[0], BLOCK_D))


@triton.jit
def _load_sums(base, dv, column, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):
    """A head's state ``(BLOCK_D, BLOCK_DV)``, keys ``(BLOCK_D,)`` and values ``(BLOCK_DV,)``, summed over tokens."""
    r, c = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    state = load_rows(base + column, r, dv, r < D, DV, BLOCK_DV)
    keys = tl.load(base + D * dv + r, mask=r < D, other=0.0)
    return state, keys, tl.load(base + D * dv + D + column + c, mask=c < DV, other=0.0)


@triton.jit
def _store_sums(
    base, state, keys, values, dv, column,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    r, c = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    store_rows(base + column, r, dv, r < D, state, DV, BLOCK_DV)
    tl.store(base + D * dv + r, keys, mask=r < D)
    tl.store(base + D * dv + D + column + c, values, mask=c < DV)


@triton.jit
def _shift(k, k_n, M, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mean of the first keys, ``(BLOCK_D,)``: near the mean of all, it keeps digits where that is subtracted."""
    n = tl.arange(0, 16)
    return tl.sum(load_rows(k, n, k_n, n < M, D, BLOCK_D), 0) / tl.minimum(M, 16)


@triton.jit
def _finished(state, keys, values, M, factor, KIND: tl.constexpr):
    """The state that queries are multiplied by, and what they are for ``z``, from sums over tokens."""
    if KIND == "injective":
        state -= keys[:, None] * (values / M)[None, :]
    return state * factor, keys * factor


@triton.jit
def _sum_keys(
    k, v, cos, sin, partial,
    k_b, k_h, k_n, v_b, v_h, v_n,
    heads, groups, M, parts, chunk, dv, column,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    KIND: tl.constexpr, ROPE: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    group = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    k += group // heads * k_b + group % heads * k_h
    v += group // heads * v_b + group % heads * v_h
    first, last = part * chunk, tl.minimum(part * chunk + chunk, M)
    CENTER: tl.constexpr = KIND == "injective" and not HALF
    if CENTER:
        shift = _shift(k, k_n, M, D, BLOCK_D)

    state = tl.zeros((BLOCK_DV, BLOCK_D), tl.float32)  # transposed, as below
    key_sum = tl.zeros((BLOCK_D,), tl.float32)
    value_sum = tl.zeros((BLOCK_DV,), tl.float32)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        keys = load_rows(k, n, k_n, n < last, D, BLOCK_D)
        values = load_rows(v, n, v_n, n < last, DV, BLOCK_DV)
        if CENTER:
            keys = tl.where((n < last)[:, None], keys - shift[None, :], 0.0)
        key_sum += tl.sum(keys.to(tl.float32), 0)
        value_sum += tl.sum(values.to(tl.float32), 0)
        if ROPE:
            keys = _rotate(keys, cos, sin, n, n < last, 1, D, BLOCK_D)
        # What is fp32 comes second: all warps hold the first operand, each its columns of the second.
        state = _product(tl.trans(values), keys, state, HALF)
    base = partial + (part * groups + group) * (D * dv + D + dv)
    _store_sums(base, tl.trans(state), key_sum, value_sum, dv, column, D, DV, BLOCK_D, BLOCK_DV)


@triton.jit
def _attend(
    q, cos, sin, sums, out,
    q_b, q_h, q_n, out_b, out_h, out_n,
    heads, N, M, parts, chunk, dv, column, factor, eps,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    KIND: tl.constexpr, ROPE: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    group = (tl.program_id(0) // parts).to(tl.int64)
    q += group // heads * q_b + group % heads * q_h
    out += group // heads * out_b + group % heads * out_h
    first = tl.program_id(0) % parts * chunk
    last = tl.minimum(first + chunk, N)
    state, keys, values = _load_sums(sums + group * (D * dv + D + dv), dv, column, D, DV, BLOCK_D, BLOCK_DV)
    state, normaliser = _finished(state, keys, values, M, factor, KIND)
    mean = (values / M)[None, :]

    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        queries = load_rows(q, n, q_n, n < last, D, BLOCK_D)
        if ROPE:
            y = _product(_rotate(queries, cos, sin, n, n < last, 1, D, BLOCK_D), state, None, HALF)
        else:
            y = _product(queries, state, None, HALF)
        z = tl.sum(queries.to(tl.float32) * normaliser[None, :], 1)
        z = tl.where(n < last, z, 1.0)[:, None]
        if KIND == "injective":
            y += mean
        elif KIND == "sum":
            y /= z + eps * factor
        else:
            y = y * (1 + 1 / (z + eps)) - z * mean
        store_rows(out, n, out_n, n < last, y, DV, BLOCK_DV)


@triton.jit
def _backward_q(
    q, cos, sin, dout, sums, dq, partial,
    q_b, q_h, q_n, do_b, do_h, do_n, dq_b, dq_h, dq_n,
    heads, groups, N, M, parts, chunk, dv, column, factor, eps,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    KIND: tl.constexpr, ROPE: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    group = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    q += group // heads * q_b + group % heads * q_h
    dout += group // heads * do_b + group % heads * do_h
    dq += group // heads * dq_b + group % heads * dq_h
    first, last = part * chunk, tl.minimum(part * chunk + chunk, N)
    width = D * dv + D + dv
    state, keys, values = _load_sums(sums + group * width, dv, column, D, DV, BLOCK_D, BLOCK_DV)
    state, normaliser = _finished(state, keys, values, M, factor, KIND)
    mean = (values / M)[None, :]

    dstate = tl.zeros((BLOCK_DV, BLOCK_D), tl.float32)  # transposed, as in _sum_keys
    dnormaliser = tl.zeros((BLOCK_D,), tl.float32)
    dmean = tl.zeros((BLOCK_DV,), tl.float32)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        valid = n < last
        queries = load_rows(q, n, q_n, valid, D, BLOCK_D)
        grads = load_rows(dout, n, do_n, valid, DV, BLOCK_DV)
        dqueries = _product(grads, tl.trans(state), None, HALF)  # before the weights of the normalisation
        if KIND == "injective":
            dstate = _product(tl.trans(grads), queries, dstate, HALF)
            dmean += tl.sum(grads.to(tl.float32), 0)
        else:
            turned = queries.to(tl.float32)
            z = tl.sum(turned * normaliser[None, :], 1)
            if ROPE:
                turned = _rotate(queries, cos, sin, n, valid, 1, D, BLOCK_D)
            inverse = 1 / tl.where(valid, z + (eps * factor if KIND == "sum" else eps), 1.0)
            dz = -inverse * inverse * tl.sum(turned * dqueries, 1)  # the sum is that of dout * y
            weight = inverse
            if KIND == "magnitude_aware":
                weight = 1 + inverse
                dz -= tl.sum(grads.to(tl.float32) * mean, 1)
                dmean -= tl.sum(grads.to(tl.float32) * z[:, None], 0)
            dstate = _product(tl.trans(grads), turned * weight[:, None], dstate, HALF)
            dnormaliser += tl.sum(queries.to(tl.float32) * dz[:, None], 0)
            dqueries *= weight[:, None]
            if ROPE:
                dqueries = _rotate(dqueries, cos, sin, n, valid, -1, D, BLOCK_D)
            dqueries += dz[:, None] * normaliser[None, :]
        store_rows(dq, n, dq_n, valid, dqueries, D, BLOCK_D)
    base = partial + (part * groups + group) * width
    _store_sums(base, tl.trans(dstate), dnormaliser, dmean, dv, column, D, DV, BLOCK_D, BLOCK_DV)


@triton.jit
def _backward_kv(
    k, v, cos, sin, sums, dsums, dk, dvalues,
    k_b, k_h, k_n, v_b, v_h, v_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    heads, M, parts, chunk, dv, column, factor,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    KIND: tl.constexpr, ROPE: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    group = (tl.program_id(0) // parts).to(tl.int64)
    k += group // heads * k_b + group % heads * k_h
    v += group // heads * v_b + group % heads * v_h
    dk += group // heads * dk_b + group % heads * dk_h
    dvalues += group // heads * dv_b + group % heads * dv_h
    first = tl.program_id(0) % parts * chunk
    last = tl.minimum(first + chunk, M)
    at = group * (D * dv + D + dv)
    dstate, dnormaliser, dmean = _load_sums(dsums + at, dv, column, D, DV, BLOCK_D, BLOCK_DV)
    dstate *= factor
    # What all keys, and all values, receive alike.
    to_keys = tl.where(column == 0, dnormaliser * factor, 0.0)
    to_values = dmean / M
    CENTER: tl.constexpr = KIND == "injective" and not HALF
    if KIND == "injective":
        _, key_mean, value_mean = _load_sums(sums + at, dv, column, D, DV, BLOCK_D, BLOCK_DV)
        key_mean, value_mean = key_mean / M, value_mean / M
        if CENTER:
            key_mean += _shift(k, k_n, M, D, BLOCK_D)
        else:
            to_keys = -tl.sum(dstate * value_mean[None, :], 1)
            to_values -= tl.sum(dstate * key_mean[:, None], 0)

    # Of wide heads in fp32, registers hold the operands of one product: the keys' gradient takes a pass of its own.
    LAST: tl.constexpr = 1 if BLOCK_D > 64 and not HALF else 0
    for turn in tl.static_range(LAST + 1):
        for start in range(first, last, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            if turn == LAST:
                keys = load_rows(k, n, k_n, n < last, D, BLOCK_D)
                if CENTER:
                    keys -= key_mean[None, :]
            if turn == 0:
                values = load_rows(v, n, v_n, n < last, DV, BLOCK_DV)
                if CENTER:
                    values -= value_mean[None, :]
                dkeys = _product(values, tl.trans(dstate), None, HALF)
                if ROPE:
                    dkeys = _rotate(dkeys, cos, sin, n, n < last, -1, D, BLOCK_D)
                store_rows(dk, n, dk_n, n < last, dkeys + to_keys[None, :], D, BLOCK_D)
            if turn == LAST:
                if ROPE:
                    keys = _rotate(keys, cos, sin, n, n < last, 1, D, BLOCK_D)
                result = _product(keys, dstate, None, HALF)
                store_rows(dvalues, n, dv_n, n < last, result + to_values[None, :], DV, BLOCK_DV)
