"""Attention inside windows, which are addressed where they lie on the map: nothing is rolled, cut or joined.

A program's tokens are slots: the tokens of one window, or of ``PACK`` whole ones where windows are small, so that
products fill tensor cores; a slot's window, its place in it and its place on the map are arithmetic. Pairs of slots of
different windows, or of tokens that a shift brought together from opposite sides of the map, are masked in registers.

Forward: one pass over the keys of a block of queries, with an online softmax. Backward: where all slots fit one block,
each window is read once for all three gradients, and a program that walks over windows keeps the sum of the bias's
gradient in registers. Larger windows take a pass over queries, one over keys, and one over windows for the bias. The
bias's gradient leaves as one partial sum a program.

Letters: B batch, h heads, H x W tokens of the map, n tokens of a window, d channels, dv channels of values. Logits are
in units of log 2; numbers kept for queries are in the order of windows.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels._blocks import LOG2E, attention_configs, block, dot, load_rows, products, store_rows
from visionattn.kernels._launch import Config, launch
from visionattn.kernels._layout import heads_last, rows
from visionattn.kernels._softmax import load_stats, online_softmax, store_stats

PROGRAMS = 1024  # that walk over windows where a bias's gradient is summed: a few on each processor of a GPU
BIAS_UNIT = tl.constexpr(LOG2E)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    grid: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend: ``(B, h, H, W, dv)``, and softmax statistics ``(B, h, H * W, 2)`` for backward (`load_stats`)."""
    q, k, v = rows(q), rows(k), rows(v)
    B, h, H, W, d = q.shape
    dv, n, biased = v.shape[4], window[0] * window[1], bias is not None
    out, stats = heads_last(v, (B, h, H, W, dv)), q.new_empty(B, h, H * W, 2, dtype=torch.float32)
    launch(
        _forward,
        lambda b: B * h * _blocks(H * W, n, b, "BLOCK_N"),
        *(q, k, v, bias, out, stats, *_strides(q, k, v, out), *_place(h, H, W, window, shift), scale * LOG2E),
        configs=_configs(q.dtype, max(d, dv), n, "BLOCK_N", "BLOCK_S", tight=biased, most=2 - biased),
        **_widths(d, dv, bias, grid),
    )
    return out, stats


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    grid: bool,
    scale: float,
    out: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias; that of no bias is empty."""
    dout, q, k, v, out = rows(dout), rows(q), rows(k), rows(v), rows(out)
    B, h, H, W, d = q.shape
    dv, n = v.shape[4], window[0] * window[1]
    dq, dk, dvalues = (heads_last(x, x.shape) for x in (q, k, v))
    place, widths = _place(h, H, W, window, shift), _widths(d, dv, bias, grid)
    scales = (scale, scale * LOG2E)
    whole = _whole(q.dtype, max(d, dv), n, biased=bias is not None)
    if whole is not None:
        items = B * triton.cdiv(H * W // n, whole.blocks["PACK"])  # blocks of windows
        per_split = 1 if bias is None else max(1, items * h // PROGRAMS)
        splits = triton.cdiv(items, per_split)
        sums = _partial_sums(bias, splits * whole.blocks["PACK"])
        launch(
            _backward_whole,
            lambda b: h * splits,
            *(q, k, v, bias, dout, dq, dk, dvalues, sums, *_strides(q, k, v, dout, dq, dk, dvalues)),
            *(*place, *scales, items, per_split),
            configs=[whole],
            **widths,
        )
        return dq, dk, dvalues, _added(sums, q)

    deltas = stats.new_empty(stats.shape[:3])
    launch(
        _backward_q,
        lambda b: B * h * _blocks(H * W, n, b, "BLOCK_N"),
        *(q, k, v, bias, out, dout, stats, deltas, dq, *_strides(q, k, v, out, dout, dq), *place, *scales),
        configs=_backward_configs(q.dtype, max(d, dv), n, own="BLOCK_N", other="BLOCK_S"),
        **widths,
    )
    launch(
        _backward_kv,
        lambda b: B * h * _blocks(H * W, n, b, "BLOCK_S"),
        *(q, k, v, bias, dout, stats, deltas, dk, dvalues, *_strides(q, k, v, dout, dk, dvalues), *place, *scales),
        # One stage: with two, sm_100 spills 36 bytes at the widths of Swin's heads.
        configs=_backward_configs(q.dtype, max(d, dv), n, own="BLOCK_S", other="BLOCK_N", most=1),
        **widths,
    )
    sums = _partial_sums(bias, 0)
    if bias is not None:
        items = B * (H * W // n)
        configs = _configs(q.dtype, max(d, dv), n, own="BLOCK_N", other="BLOCK_S", tight=True)[:1]
        tiles = triton.cdiv(n, configs[0].blocks["BLOCK_N"]) * triton.cdiv(n, configs[0].blocks["BLOCK_S"])
        warps = 8 if max(d, dv) > 64 else configs[0].warps  # at four, wide heads spill registers
        per_split = max(1, items * h * tiles // PROGRAMS)
        splits = triton.cdiv(items, per_split)
        sums = _partial_sums(bias, splits)
        launch(
            _backward_bias,
            lambda b: h * splits * tiles,
            *(q, k, v, bias, dout, stats, deltas, sums, *_strides(q, k, v, dout), *place, scale * LOG2E),
            *(items, per_split),
            configs=[Config({**configs[0].blocks, "PACK": 1}, warps, configs[0].stages)],
            **widths,
        )
    return dq, dk, dvalues, _added(sums, q)


def _configs(dtype: torch.dtype, width: int, n: int, own: str, other: str, tight: bool, most: int = 2) -> list[Config]:
    """As `attention_configs`, with at most so many stages, and as many windows as fit the block of own tokens."""
    # Bias and gradients take the registers that heads of twice the width would.
    configs = attention_configs(dtype, 2 * width if tight else width, own=own, other=other)
    return [Config({**c.blocks, "PACK": max(1, c.blocks[own] // n)}, c.warps, min(c.stages, most)) for c in configs]


def _backward_configs(dtype: torch.dtype, width: int, n: int, own: str, other: str, most: int = 2) -> list[Config]:
    """Of the passes over queries and over keys."""
    if dtype == torch.float32 and width > 64:  # larger blocks, or fewer warps, spill registers
        return [Config({own: 16, other: 16, "PACK": max(1, 16 // n)}, warps=8, stages=1)]
    return _configs(dtype, width, n, own, other, tight=True, most=most)


def _whole(dtype: torch.dtype, width: int, n: int, *, biased: bool) -> Config | None:
    """Return the configuration of the backward pass that holds whole windows, or None where they are too large."""
    size = 32 if n <= 32 else 64
    fits = n <= 32 and not biased if dtype == torch.float32 else n <= (64 if width <= 32 else 32)
    return Config({"BLOCK": size, "PACK": size // n}, stages=1) if fits and width <= 64 else None


def _blocks(tokens: int, n: int, sizes: dict[str, int], own: str) -> int:
    """Programs of a head and item of the batch."""
    return triton.cdiv(tokens // n, sizes["PACK"]) * triton.cdiv(sizes["PACK"] * n, sizes[own])


def _strides(*maps: Tensor) -> list[int]:
    return [s for x in maps for s in x.stride()[:4]]


def _place(h: int, H: int, W: int, window: Sequence[int], shift: Sequence[int]) -> tuple[int, ...]:
    return (h, H, W, *window, *shift)


def _widths(d: int, dv: int, bias: Tensor | None, grid: bool) -> dict[str, int]:
    return {"D": d, "DV": dv, "BLOCK_D": block(d), "BLOCK_DV": block(dv), "BIASED": bias is not None, "GRID": grid}


def _partial_sums(bias: Tensor | None, count: int) -> Tensor | None:
    return None if bias is None else bias.new_empty(count, *bias.shape, dtype=torch.float32)


def _added(sums: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if sums is None else sums.sum(0).to(like.dtype)


@triton.jit
def _program(pid, heads, H, W, window_h, window_w, PACK: tl.constexpr, BLOCK: tl.constexpr):
    """Item of the batch, head, first window and first slot of a program that owns a block of slots."""
    n = window_h * window_w
    blocks = tl.cdiv(PACK * n, BLOCK)
    spans = tl.cdiv(H * W // n, PACK)
    head, pid = pid % heads, pid // heads  # heads first: those of a token lie side by side
    start, pid = pid % blocks * BLOCK, pid // blocks
    return (pid // spans).to(tl.int64), head.to(tl.int64), pid % spans * PACK, start


@triton.jit
def _slots(
    slot, first, H, W, window_h, window_w, shift_h, shift_w, PACK: tl.constexpr, GRID: tl.constexpr
):  # fmt: skip
    """Of slots from window ``first`` on: what they may attend to (as a number, -1 for none), token, row, column."""
    n = window_h * window_w
    across = W // window_w
    if PACK == 1:  # said so that the compiler sees runs of tokens
        window, token = first, slot
    else:
        window, token = first + slot // n, slot % n
    i, j, y, x = window // across, window % across, token // window_w, token % window_w
    if GRID:
        y, x = y * (H // window_h) + i, x * across + j
    else:
        y, x = i * window_h + y, j * window_w + x
    # Rows and columns that a shift brings in from the other side.
    group = 4 * window + 2 * (y >= H - shift_h).to(tl.int32) + (x >= W - shift_w).to(tl.int32)
    y, x = y + shift_h, x + shift_w
    y, x = tl.where(y >= H, y - H, y), tl.where(x >= W, x - W, x)
    valid = (slot < PACK * n) & (window < H * W // n)
    return tl.where(valid, group, -1), token, y, x


@triton.jit
def _pairs(row, col):
    """Which groups of rows and columns are the same."""
    return row[:, None] == tl.where(col < 0, -2, col)[None, :]


@triton.jit
def _at(y, x, stride_y, stride_x):
    """Where rows of a map start."""
    return y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x


@triton.jit
def _load(base, y, x, stride_y, stride_x, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a map: ``(slots, BLOCK_D)``."""
    return load_rows(base, _at(y, x, stride_y, stride_x), 1, valid, D, BLOCK_D)


@triton.jit
def _store(base, y, x, stride_y, stride_x, valid, rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write rows of a map."""
    store_rows(base, _at(y, x, stride_y, stride_x), 1, valid, rows, D, BLOCK_D)


@triton.jit
def _logits(match, scale2, bias, same, query, key, n, BIASED: tl.constexpr):
    """Masked logits from products; ``same`` says which pairs may attend, ``query`` and ``key`` their tokens."""
    logits = match * scale2
    if BIASED:
        logits += tl.load(bias + query * n + key, mask=same, other=0.0).to(tl.float32) * BIAS_UNIT
    return tl.where(same, logits, float("-inf"))


@triton.jit
def _forward(
    q, k, v, bias, out, stats,
    q_b, q_h, q_y, q_x, k_b, k_h, k_y, k_x, v_b, v_h, v_y, v_x, out_b, out_h, out_y, out_x,
    heads, H, W, window_h, window_w, shift_h, shift_w, scale2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BIASED: tl.constexpr, GRID: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    b, head, first, start = _program(tl.program_id(0), heads, H, W, window_h, window_w, PACK, BLOCK_N)
    n = window_h * window_w
    q += b * q_b + head * q_h
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    if BIASED:
        bias += head * n * n
    slot = start + tl.arange(0, BLOCK_N)
    group, query, y, x = _slots(slot, first, H, W, window_h, window_w, shift_h, shift_w, PACK, GRID)
    queries = _load(q, y, x, q_y, q_x, group >= 0, D, BLOCK_D)

    # Not minus infinity, so that a block without a key for a query leaves its sum as it is.
    top = tl.full((BLOCK_N,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    result = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for at in range(0, PACK * n, BLOCK_S):
        other, key, ky, kx = _slots(
            at + tl.arange(0, BLOCK_S), first, H, W, window_h, window_w, shift_h, shift_w, PACK, GRID
        )
        keys = _load(k, ky, kx, k_y, k_x, other >= 0, D, BLOCK_D)
        same = _pairs(group, other)
        logits = _logits(dot(queries, tl.trans(keys)), scale2, bias, same, query[:, None], key[None, :], n, BIASED)
        attn, shrink, top, total = online_softmax(logits, top, total)
        values = _load(v, ky, kx, v_y, v_x, other >= 0, DV, BLOCK_DV)
        result = dot(attn.to(values.dtype), values, result * shrink[:, None])
    total = tl.where(group >= 0, total, 1.0)
    inverse = store_stats(stats, (b * heads + head) * H * W + first * n + slot, group >= 0, top, total)
    _store(out + b * out_b + head * out_h, y, x, out_y, out_x, group >= 0, result * inverse[:, None], DV, BLOCK_DV)


@triton.jit
def _backward_whole(
    q, k, v, bias, dout, dq, dk, dv, sums,
    q_b, q_h, q_y, q_x, k_b, k_h, k_y, k_x, v_b, v_h, v_y, v_x, do_b, do_h, do_y, do_x,
    dq_b, dq_h, dq_y, dq_x, dk_b, dk_h, dk_y, dk_x, dv_b, dv_h, dv_y, dv_x,
    heads, H, W, window_h, window_w, shift_h, shift_w, scale, scale2, items, per_split,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BIASED: tl.constexpr, GRID: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    head, split = (tl.program_id(0) % heads).to(tl.int64), tl.program_id(0) // heads
    n = window_h * window_w
    spans = tl.cdiv(H * W // n, PACK)
    q += head * q_h
    k += head * k_h
    v += head * v_h
    dout += head * do_h
    dq += head * dq_h
    dk += head * dk_h
    dv += head * dv_h
    if BIASED:
        bias += head * n * n
    slot = tl.arange(0, BLOCK)
    dbias = tl.zeros((BLOCK, BLOCK), tl.float32)
    for item in range(split * per_split, tl.minimum((split + 1) * per_split, items)):
        b, first = (item // spans).to(tl.int64), item % spans * PACK
        group, token, y, x = _slots(slot, first, H, W, window_h, window_w, shift_h, shift_w, PACK, GRID)
        valid = group >= 0
        queries = _load(q + b * q_b, y, x, q_y, q_x, valid, D, BLOCK_D)
        keys = _load(k + b * k_b, y, x, k_y, k_x, valid, D, BLOCK_D)
        grads = _load(dout + b * do_b, y, x, do_y, do_x, valid, DV, BLOCK_DV)
        same = _pairs(group, group)
        logits = _logits(dot(queries, tl.trans(keys)), scale2, bias, same, token[:, None], token[None, :], n, BIASED)
        attn = tl.exp2(logits - tl.maximum(tl.max(logits, 1), -1e30)[:, None])
        attn *= (1.0 / tl.where(valid, tl.sum(attn, 1), 1.0))[:, None]
        dvalues = dot(tl.trans(attn.to(grads.dtype)), grads)
        _store(dv + b * dv_b, y, x, dv_y, dv_x, valid, dvalues, DV, BLOCK_DV)
        values = _load(v + b * v_b, y, x, v_y, v_x, valid, DV, BLOCK_DV)
        dattn = dot(grads, tl.trans(values))
        dlogits = attn * (dattn - tl.sum(attn * dattn, 1)[:, None])
        if BIASED:
            dbias += dlogits
        change = dlogits.to(keys.dtype)
        _store(dq + b * dq_b, y, x, dq_y, dq_x, valid, dot(change, keys) * scale, D, BLOCK_D)
        _store(dk + b * dk_b, y, x, dk_y, dk_x, valid, dot(tl.trans(change), queries) * scale, D, BLOCK_D)
    if BIASED:
        window, token = slot // n, slot % n
        at = ((split * PACK + window).to(tl.int64) * heads + head) * n * n
        own = (window[:, None] == window[None, :]) & (slot < PACK * n)[:, None] & (slot < PACK * n)[None, :]
        tl.store(sums + (at + token * n)[:, None] + token[None, :], dbias, mask=own)


@triton.jit
def _backward_q(
    q, k, v, bias, out, dout, stats, deltas, dq,
    q_b, q_h, q_y, q_x, k_b, k_h, k_y, k_x, v_b, v_h, v_y, v_x, out_b, out_h, out_y, out_x,
    do_b, do_h, do_y, do_x, dq_b, dq_h, dq_y, dq_x,
    heads, H, W, window_h, window_w, shift_h, shift_w, scale, scale2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BIASED: tl.constexpr, GRID: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    b, head, first, start = _program(tl.program_id(0), heads, H, W, window_h, window_w, PACK, BLOCK_N)
    n = window_h * window_w
    q += b * q_b + head * q_h
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    out += b * out_b + head * out_h
    dout += b * do_b + head * do_h
    if BIASED:
        bias += head * n * n
    slot = start + tl.arange(0, BLOCK_N)
    group, query, y, x = _slots(slot, first, H, W, window_h, window_w, shift_h, shift_w, PACK, GRID)
    queries = _load(q, y, x, q_y, q_x, group >= 0, D, BLOCK_D)
    grads = _load(dout, y, x, do_y, do_x, group >= 0, DV, BLOCK_DV)
    result = _load(out, y, x, out_y, out_x, group >= 0, DV, BLOCK_DV)
    delta = tl.sum(result.to(tl.float32) * grads.to(tl.float32), 1)
    at = (b * heads + head) * H * W + first * n + slot
    tl.store(deltas + at, delta, mask=group >= 0)
    top, inverse = load_stats(stats, at, group >= 0)

    change = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for at in range(0, PACK * n, BLOCK_S):
        other, key, ky, kx = _slots(
            at + tl.arange(0, BLOCK_S), first, H, W, window_h, window_w, shift_h, shift_w, PACK, GRID
        )
        keys = _load(k, ky, kx, k_y, k_x, other >= 0, D, BLOCK_D)
        values = _load(v, ky, kx, v_y, v_x, other >= 0, DV, BLOCK_DV)
        same = _pairs(group, other)
        logits = _logits(dot(queries, tl.trans(keys)), scale2, bias, same, query[:, None], key[None, :], n, BIASED)
        attn = tl.exp2(logits - top[:, None]) * inverse[:, None]
        dlogits = attn * (dot(grads, tl.trans(values)) - delta[:, None])
        change = dot(dlogits.to(keys.dtype), keys, change)
    _store(dq + b * dq_b + head * dq_h, y, x, dq_y, dq_x, group >= 0, change * scale, D, BLOCK_D)


@triton.jit
def _backward_kv(
    q, k, v, bias, dout, stats, deltas, dk, dv,
    q_b, q_h, q_y, q_x, k_b, k_h, k_y, k_x, v_b, v_h, v_y, v_x, do_b, do_h, do_y, do_x,
    dk_b, dk_h, dk_y, dk_x, dv_b, dv_h, dv_y, dv_x,
    heads, H, W, window_h, window_w, shift_h, shift_w, scale, scale2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BIASED: tl.constexpr, GRID: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    b, head, first, start = _program(tl.program_id(0), heads, H, W, window_h, window_w, PACK, BLOCK_S)
    n = window_h * window_w
    q += b * q_b + head * q_h
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    dout += b * do_b + head * do_h
    if BIASED:
        bias += head * n * n
    of_queries = (b * heads + head) * H * W + first * n
    slot = start + tl.arange(0, BLOCK_S)
    group, key, y, x = _slots(slot, first, H, W, window_h, window_w, shift_h, shift_w, PACK, GRID)
    keys = _load(k, y, x, k_y, k_x, group >= 0, D, BLOCK_D)
    values = _load(v, y, x, v_y, v_x, group >= 0, DV, BLOCK_DV)

    dkeys = tl.zeros((BLOCK_S, BLOCK_D), tl.float32)
    dvalues = tl.zeros((BLOCK_S, BLOCK_DV), tl.float32)
    for at in range(0, PACK * n, BLOCK_N):
        others = at + tl.arange(0, BLOCK_N)
        other, query, qy, qx = _slots(others, first, H, W, window_h, window_w, shift_h, shift_w, PACK, GRID)
        queries = _load(q, qy, qx, q_y, q_x, other >= 0, D, BLOCK_D)
        grads = _load(dout, qy, qx, do_y, do_x, other >= 0, DV, BLOCK_DV)
        top, inverse = load_stats(stats, of_queries + others, other >= 0)
        delta = tl.load(deltas + of_queries + others, mask=other >= 0, other=0.0)
        same = _pairs(group, other)
        logits = _logits(dot(keys, tl.trans(queries)), scale2, bias, same, query[None, :], key[:, None], n, BIASED)
        attn = tl.exp2(logits - top[None, :]) * inverse[None, :]  # (keys, queries)
        dvalues = dot(attn.to(grads.dtype), grads, dvalues)
        dlogits = attn * (dot(values, tl.trans(grads)) - delta[None, :])
        dkeys = dot(dlogits.to(queries.dtype), queries, dkeys)
    _store(dk + b * dk_b + head * dk_h, y, x, dk_y, dk_x, group >= 0, dkeys * scale, D, BLOCK_D)
    _store(dv + b * dv_b + head * dv_h, y, x, dv_y, dv_x, group >= 0, dvalues, DV, BLOCK_DV)


@triton.jit
def _backward_bias(
    q, k, v, bias, dout, stats, deltas, sums,
    q_b, q_h, q_y, q_x, k_b, k_h, k_y, k_x, v_b, v_h, v_y, v_x, do_b, do_h, do_y, do_x,
    heads, H, W, window_h, window_w, shift_h, shift_w, scale2, items, per_split,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BIASED: tl.constexpr, GRID: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    n = window_h * window_w
    head, pid = (tl.program_id(0) % heads).to(tl.int64), tl.program_id(0) // heads
    across = tl.cdiv(n, BLOCK_S)
    tiles = across * tl.cdiv(n, BLOCK_N)
    tile, split = pid % tiles, pid // tiles
    query_slot = tile // across * BLOCK_N + tl.arange(0, BLOCK_N)
    key_slot = tile % across * BLOCK_S + tl.arange(0, BLOCK_S)
    q += head * q_h
    k += head * k_h
    v += head * v_h
    dout += head * do_h
    bias += head * n * n
    windows = H * W // n
    result = tl.zeros((BLOCK_N, BLOCK_S), tl.float32)
    for item in range(split * per_split, tl.minimum((split + 1) * per_split, items)):
        b, window = (item // windows).to(tl.int64), item % windows
        group, query, y, x = _slots(query_slot, window, H, W, window_h, window_w, shift_h, shift_w, PACK, GRID)
        other, key, ky, kx = _slots(key_slot, window, H, W, window_h, window_w, shift_h, shift_w, PACK, GRID)
        q_rows, k_rows, do_rows, v_rows = q + b * q_b, k + b * k_b, dout + b * do_b, v + b * v_b
        queries = _load(q_rows, y, x, q_y, q_x, group >= 0, D, BLOCK_D)
        grads = _load(do_rows, y, x, do_y, do_x, group >= 0, DV, BLOCK_DV)
        keys = _load(k_rows, ky, kx, k_y, k_x, other >= 0, D, BLOCK_D)
        values = _load(v_rows, ky, kx, v_y, v_x, other >= 0, DV, BLOCK_DV)
        q_at, k_at = _at(y, x, q_y, q_x), _at(ky, kx, k_y, k_x)
        match = products(queries, keys, q_rows, q_at, group >= 0, k_rows, k_at, other >= 0, D, BLOCK_D)
        at = (b * heads + head) * H * W + window * n + query_slot
        top, inverse = load_stats(stats, at, group >= 0)
        delta = tl.load(deltas + at, mask=group >= 0, other=0.0)
        same = _pairs(group, other)
        logits = _logits(match, scale2, bias, same, query[:, None], key[None, :], n, BIASED)
        attn = tl.exp2(logits - top[:, None]) * inverse[:, None]
        do_at, v_at = _at(y, x, do_y, do_x), _at(ky, kx, v_y, v_x)
        dattn = products(grads, values, do_rows, do_at, group >= 0, v_rows, v_at, other >= 0, DV, BLOCK_DV)
        result += attn * (dattn - delta[:, None])
    sums += (split.to(tl.int64) * heads + head) * n * n
    inside = (query_slot < n)[:, None] & (key_slot < n)[None, :]
    tl.store(sums + query_slot[:, None] * n + key_slot[None, :], result, mask=inside)
