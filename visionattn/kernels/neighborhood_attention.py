"""Neighbourhood attention with dilation and relative bias, by small tiles of the map.

Tokens of equal index modulo the dilation form a class, and a token sees tokens of its class alone. A program holds a
tile of neighbouring queries of one class and walks over the rectangle of keys that their windows reach, masking what
lies outside of each window: a key is loaded once for each of the few tiles that see it, not for each query. Gradients
of keys and values walk from a tile of keys over the rectangle of queries that see any of it, so nothing is scattered.

The gradient of the bias sums the pairs of a token and its neighbour by their distance. Such a pair lies at the same
place from the corner of every tile, so programs add up tiles in place, one block of places each; sums of diagonals
remain.

Letters: B batch, h heads, N tokens, d channels, dv channels of values. Positions and sizes count tokens of a class,
``y`` down and ``x`` along the map; logits are in units of log 2.
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

TILES = {16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16)}  # of a program's own tokens
PROGRAMS = 1024  # that share the work on the bias's gradient: several for each multiprocessor

Pair = tuple[int, int]


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel_size: Pair, dilation: Pair, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend: ``(B, h, H, W, dv)``, and softmax statistics ``(B, h, N, 2)`` for the backward pass (`load_stats`)."""
    B, h, H, W, d = q.shape
    dv = v.shape[-1]
    q, k, v = (_tokens(x) for x in (q, k, v))
    out, stats = heads_last(v, (B, h, H * W, dv)), q.new_empty(B, h, H * W, 2, dtype=torch.float32)
    launch(
        _forward,
        lambda b: B * h * _tiles((H, W), dilation, b),
        *(q, k, v, _table(bias), out, stats, *(s for x in (q, k, v, out) for s in x.stride()[:3])),
        *(h, H, W, *kernel_size, *dilation, scale * LOG2E),
        configs=_configs(q.dtype, max(d, dv)),
        **_widths(d, dv),
    )
    return out.unflatten(2, (H, W)), stats


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kernel_size: Pair,
    dilation: Pair,
    scale: float,
    out: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias; an empty tensor for the last without a bias."""
    B, h, H, W, d = q.shape
    width, table = v.shape[-1], _table(bias)
    dout, q, k, v, out = (_tokens(x) for x in (dout, q, k, v, out))
    dq, dk, dv = (heads_last(x, x.shape) for x in (q, k, v))
    sums = stats.new_empty(B, h, H * W)
    inputs = [s for x in (q, k, v, dout) for s in x.stride()[:3]]
    numbers = (h, H, W, *kernel_size, *dilation, scale, scale * LOG2E)
    launch(
        _backward_q,
        lambda b: B * h * _tiles((H, W), dilation, b),
        *(q, k, v, table, dout, out, stats, sums, dq, *inputs, *out.stride()[:3], *dq.stride()[:3], *numbers),
        configs=_configs(q.dtype, max(d, width)),
        **_widths(d, width),
    )
    launch(
        _backward_kv,
        lambda b: B * h * _tiles((H, W), dilation, b),
        *(q, k, v, table, dout, stats, sums, dk, dv, *inputs, *dk.stride()[:3], *dv.stride()[:3], *numbers),
        configs=_configs_by_keys(q.dtype, max(d, width)),
        **_widths(d, width),
    )
    dq, dk, dv = (x.unflatten(2, (H, W)) for x in (dq, dk, dv))
    if bias is None or table is None:
        return dq, dk, dv, q.new_empty(0)

    config = _configs(q.dtype, max(d, width))[0]  # alone: the sums are laid out by its tiles
    tile_h, tile_w = config.blocks["TILE_H"], config.blocks["TILE_W"]
    (Kh, Kw), items = kernel_size, B * _tiles((H, W), dilation, config.blocks)
    reach_h, reach_w = tile_h + 2 * (Kh - 1), tile_w + 2 * (Kw - 1)  # where keys can lie from a tile's corner
    blocks = triton.cdiv(reach_h * reach_w, config.blocks["BLOCK"])
    splits = min(items, triton.cdiv(PROGRAMS, max(1, h * blocks)))
    partial = table.new_empty(splits, h, tile_h * tile_w, reach_h * reach_w)
    launch(
        _backward_bias,
        lambda b: h * splits * blocks,
        *(q, k, v, table, dout, stats, sums, partial, *inputs),
        *(h, H, W, Kh, Kw, *dilation, scale * LOG2E, items, splits),
        configs=[config],
        **_widths(d, width),
    )
    pairs = partial.sum(dim=0)  # (h, queries of the tile, places of keys)
    offsets = (2 * Kh - 1, 2 * Kw - 1)  # the key of query (y, x) at offset (a, b) lies at place (y + a, x + b)
    strides = (reach_w, 1, tile_w * reach_h * reach_w + reach_w, reach_h * reach_w + 1)
    diagonals = pairs.as_strided((h, *offsets, tile_h, tile_w), (pairs.stride(0), *strides))
    return dq, dk, dv, diagonals.sum(dim=(-2, -1)).to(bias.dtype)


def _tokens(x: Tensor) -> Tensor:
    """``(B, h, H, W, d)`` to ``(B, h, N, d)``; copied only where rows of the map are not evenly spaced."""
    return rows(x).flatten(2, 3)


def _table(bias: Tensor | None) -> Tensor | None:
    """The bias as it is added to logits."""
    return None if bias is None else (bias.float() * LOG2E).contiguous()


def _tiles(size: Pair, dilation: Pair, blocks: dict[str, int]) -> int:
    """How many tiles a map has: as many for each class as the largest needs."""
    (H, W), (dh, dw) = size, dilation
    tiles = (triton.cdiv(triton.cdiv(n, s), blocks[name]) for n, s, name in ((H, dh, "TILE_H"), (W, dw, "TILE_W")))
    return dh * dw * next(tiles) * next(tiles)


def _configs(dtype: torch.dtype, width: int) -> list[Config]:
    def tiled(config: Config) -> Config:
        tile_h, tile_w = TILES[config.blocks["OWN"]]
        # Wider blocks spill registers at sm_80: places and biases of pairs take some too.
        blocks = {"TILE_H": tile_h, "TILE_W": tile_w, "BLOCK": min(config.blocks["OTHER"], 32)}
        return Config(blocks, config.warps, config.stages)

    return [tiled(c) for c in attention_configs(dtype, width, own="OWN", other="OTHER")]


def _configs_by_keys(dtype: torch.dtype, width: int) -> list[Config]:
    # One stage: with two, sm_80 spills at the width of NAT's heads.
    configs = [replace(c, stages=1) for c in _configs(dtype, width)]
    if dtype == torch.float32 and width > 64:  # wider blocks spill at sm_80, and at more warps at gfx942
        return [replace(c, blocks={**c.blocks, "BLOCK": 16}) for c in configs]
    return configs


def _widths(d: int, dv: int) -> dict[str, int]:
    return {"D": d, "DV": dv, "BLOCK_D": block(d), "BLOCK_DV": block(dv)}


LOWEST = tl.constexpr(-3.0e38)  # below every logit, and finite: a block may hold no key of a query
NOWHERE = tl.constexpr(2**30)  # a position that no key has


@triton.jit
def _tile(tile, H, W, dh, dw, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Class, corner and size of the class of a map's tile, each down and along."""
    tiles_y, tiles_x = tl.cdiv(tl.cdiv(H, dh), TILE_H), tl.cdiv(tl.cdiv(W, dw), TILE_W)
    kind = tile // (tiles_y * tiles_x)
    class_y, class_x = kind // dw, kind % dw
    corner_y, corner_x = tile // tiles_x % tiles_y * TILE_H, tile % tiles_x * TILE_W
    return class_y, class_x, corner_y, corner_x, (H - 1 - class_y) // dh + 1, (W - 1 - class_x) // dw + 1


@triton.jit
def _window(position, size, kernel):
    """First key of a query."""
    return tl.minimum(tl.maximum(position - kernel // 2, 0), size - kernel)


@triton.jit
def _keys_of(corner, TILE: tl.constexpr, size, kernel):
    """First key that a tile's queries see, and how many from there on."""
    first = _window(tl.minimum(corner, size - 1), size, kernel)
    return first, _window(tl.minimum(corner + TILE, size) - 1, size, kernel) + kernel - first


@triton.jit
def _queries_of(corner, TILE: tl.constexpr, size, kernel):
    """First query that sees a key of a tile, and how many from there on."""
    first_key, last_key = tl.minimum(corner, size - 1), tl.minimum(corner + TILE, size) - 1
    # The windows of the first queries all start at 0, those of the last all end with the class.
    first = tl.where(first_key < kernel, 0, first_key - kernel + 1 + kernel // 2)
    last = tl.where(last_key >= size - kernel, size - 1, last_key + kernel // 2)
    return first, last - first + 1


@triton.jit
def _add_bias(logits, qy, qx, window_y, window_x, ky, kx, bias, kernel_y, kernel_x):
    """Add the bias, and -inf outside of the window. Positions are shaped like rows and columns of the logits."""
    inside = (ky >= window_y) & (ky < window_y + kernel_y) & (kx >= window_x) & (kx < window_x + kernel_x)
    if bias is not None:
        across = 2 * kernel_x - 1
        query = (qy - kernel_y + 1) * across + qx - kernel_x + 1
        logits += tl.load(bias + (ky * across + kx - query), mask=inside, other=0.0)
    return tl.where(inside, logits, float("-inf"))


@triton.jit
def _forward(
    q, k, v, bias, out, stats,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n,
    heads, H, W, kernel_y, kernel_x, dh, dw, scale2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tiles = dh * dw * tl.cdiv(tl.cdiv(H, dh), TILE_H) * tl.cdiv(tl.cdiv(W, dw), TILE_W)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    b, head = group // heads, group % heads
    q += b * q_b + head * q_h
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    out += b * out_b + head * out_h
    if bias is not None:
        bias += head * (2 * kernel_y - 1) * (2 * kernel_x - 1)
    tile = tl.program_id(0) % tiles
    class_y, class_x, corner_y, corner_x, size_y, size_x = _tile(tile, H, W, dh, dw, TILE_H, TILE_W)
    i = tl.arange(0, TILE_H * TILE_W)
    qy, qx = corner_y + i // TILE_W, corner_x + i % TILE_W
    valid = (qy < size_y) & (qx < size_x)
    qy, qx = tl.minimum(qy, size_y - 1), tl.minimum(qx, size_x - 1)
    n = (qy * dh + class_y) * W + qx * dw + class_x
    window_y, window_x = _window(qy, size_y, kernel_y), _window(qx, size_x, kernel_x)
    queries = load_rows(q, n, q_n, valid, D, BLOCK_D)

    first_y, count_y = _keys_of(corner_y, TILE_H, size_y, kernel_y)
    first_x, count_x = _keys_of(corner_x, TILE_W, size_x, kernel_x)
    top = tl.full((TILE_H * TILE_W,), LOWEST, tl.float32)  # largest logit so far
    total = tl.zeros((TILE_H * TILE_W,), tl.float32)  # sum of exponentials, relative to it
    result = tl.zeros((TILE_H * TILE_W, BLOCK_DV), tl.float32)
    for start in range(0, count_y * count_x, BLOCK):
        j = start + tl.arange(0, BLOCK)
        ky, kx = first_y + j // count_x, first_x + j % count_x
        s = (ky * dh + class_y) * W + kx * dw + class_x
        keys = load_rows(k, s, k_n, j < count_y * count_x, D, BLOCK_D)
        values = load_rows(v, s, v_n, j < count_y * count_x, DV, BLOCK_DV)
        logits = _add_bias(
            dot(queries, tl.trans(keys)) * scale2,
            *(qy[:, None], qx[:, None], window_y[:, None], window_x[:, None], ky[None, :], kx[None, :]),
            *(bias, kernel_y, kernel_x),
        )
        attn, shrink, top, total = online_softmax(logits, top, total)
        result = dot(attn.to(values.dtype), values, result * shrink[:, None])
    inverse = store_stats(stats, group * H * W + n, valid, top, total)
    store_rows(out, n, out_n, valid, result * inverse[:, None], DV, BLOCK_DV)


@triton.jit
def _backward_q(
    q, k, v, bias, dout, out, stats, sums, dq,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, out_b, out_h, out_n, dq_b, dq_h, dq_n,
    heads, H, W, kernel_y, kernel_x, dh, dw, scale, scale2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tiles = dh * dw * tl.cdiv(tl.cdiv(H, dh), TILE_H) * tl.cdiv(tl.cdiv(W, dw), TILE_W)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    b, head = group // heads, group % heads
    q += b * q_b + head * q_h
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    dout += b * do_b + head * do_h
    out += b * out_b + head * out_h
    if bias is not None:
        bias += head * (2 * kernel_y - 1) * (2 * kernel_x - 1)
    tile = tl.program_id(0) % tiles
    class_y, class_x, corner_y, corner_x, size_y, size_x = _tile(tile, H, W, dh, dw, TILE_H, TILE_W)
    i = tl.arange(0, TILE_H * TILE_W)
    qy, qx = corner_y + i // TILE_W, corner_x + i % TILE_W
    valid = (qy < size_y) & (qx < size_x)
    qy, qx = tl.minimum(qy, size_y - 1), tl.minimum(qx, size_x - 1)
    n = (qy * dh + class_y) * W + qx * dw + class_x
    window_y, window_x = _window(qy, size_y, kernel_y), _window(qx, size_x, kernel_x)
    queries = load_rows(q, n, q_n, valid, D, BLOCK_D)
    grads = load_rows(dout, n, do_n, valid, DV, BLOCK_DV)
    outputs = load_rows(out, n, out_n, valid, DV, BLOCK_DV)
    top, inverse = load_stats(stats, group * H * W + n, valid)
    row_sum = tl.sum(grads.to(tl.float32) * outputs.to(tl.float32), 1)  # of probability times its gradient
    tl.store(sums + group * H * W + n, row_sum, mask=valid)

    first_y, count_y = _keys_of(corner_y, TILE_H, size_y, kernel_y)
    first_x, count_x = _keys_of(corner_x, TILE_W, size_x, kernel_x)
    result = tl.zeros((TILE_H * TILE_W, BLOCK_D), tl.float32)
    for start in range(0, count_y * count_x, BLOCK):
        j = start + tl.arange(0, BLOCK)
        ky, kx = first_y + j // count_x, first_x + j % count_x
        s = (ky * dh + class_y) * W + kx * dw + class_x
        keys = load_rows(k, s, k_n, j < count_y * count_x, D, BLOCK_D)
        values = load_rows(v, s, v_n, j < count_y * count_x, DV, BLOCK_DV)
        logits = _add_bias(
            dot(queries, tl.trans(keys)) * scale2,
            *(qy[:, None], qx[:, None], window_y[:, None], window_x[:, None], ky[None, :], kx[None, :]),
            *(bias, kernel_y, kernel_x),
        )
        attn = tl.exp2(logits - top[:, None]) * inverse[:, None]
        dlogits = attn * (dot(grads, tl.trans(values)) - row_sum[:, None])
        result = dot(dlogits.to(keys.dtype), keys, result)
    store_rows(dq + b * dq_b + head * dq_h, n, dq_n, valid, result * scale, D, BLOCK_D)


@triton.jit
def _backward_kv(
    q, k, v, bias, dout, stats, sums, dk, dv,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    heads, H, W, kernel_y, kernel_x, dh, dw, scale, scale2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tiles = dh * dw * tl.cdiv(tl.cdiv(H, dh), TILE_H) * tl.cdiv(tl.cdiv(W, dw), TILE_W)
    group = (tl.program_id(0) // tiles).to(tl.int64)
    b, head = group // heads, group % heads
    q += b * q_b + head * q_h
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    dout += b * do_b + head * do_h
    if bias is not None:
        bias += head * (2 * kernel_y - 1) * (2 * kernel_x - 1)
    tile = tl.program_id(0) % tiles
    class_y, class_x, corner_y, corner_x, size_y, size_x = _tile(tile, H, W, dh, dw, TILE_H, TILE_W)
    i = tl.arange(0, TILE_H * TILE_W)
    ky, kx = corner_y + i // TILE_W, corner_x + i % TILE_W
    valid = (ky < size_y) & (kx < size_x)
    s = (ky * dh + class_y) * W + kx * dw + class_x
    keys = load_rows(k, s, k_n, valid, D, BLOCK_D)
    values = load_rows(v, s, v_n, valid, DV, BLOCK_DV)

    first_y, count_y = _queries_of(corner_y, TILE_H, size_y, kernel_y)
    first_x, count_x = _queries_of(corner_x, TILE_W, size_x, kernel_x)
    dkeys = tl.zeros((TILE_H * TILE_W, BLOCK_D), tl.float32)
    dvalues = tl.zeros((TILE_H * TILE_W, BLOCK_DV), tl.float32)
    for start in range(0, count_y * count_x, BLOCK):
        j = start + tl.arange(0, BLOCK)
        is_query = j < count_y * count_x
        qy, qx = first_y + j // count_x, first_x + j % count_x
        n = (qy * dh + class_y) * W + qx * dw + class_x
        window_y = tl.where(is_query, _window(qy, size_y, kernel_y), NOWHERE)
        window_x = _window(qx, size_x, kernel_x)
        queries = load_rows(q, n, q_n, is_query, D, BLOCK_D)
        grads = load_rows(dout, n, do_n, is_query, DV, BLOCK_DV)
        top, inverse = load_stats(stats, group * H * W + n, is_query)
        row_sum = tl.load(sums + group * H * W + n, mask=is_query, other=0.0)
        logits = _add_bias(  # (keys, queries)
            dot(keys, tl.trans(queries)) * scale2,
            *(qy[None, :], qx[None, :], window_y[None, :], window_x[None, :], ky[:, None], kx[:, None]),
            *(bias, kernel_y, kernel_x),
        )
        attn = tl.exp2(logits - top[None, :]) * inverse[None, :]
        dvalues = dot(attn.to(grads.dtype), grads, dvalues)
        dlogits = attn * (dot(values, tl.trans(grads)) - row_sum[None, :])
        dkeys = dot(dlogits.to(queries.dtype), queries, dkeys)
    store_rows(dk + b * dk_b + head * dk_h, s, dk_n, valid, dkeys * scale, D, BLOCK_D)
    store_rows(dv + b * dv_b + head * dv_h, s, dv_n, valid, dvalues, DV, BLOCK_DV)


@triton.jit
def _backward_bias(
    q, k, v, bias, dout, stats, sums, partial,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n,
    heads, H, W, kernel_y, kernel_x, dh, dw, scale2, items, splits,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    reach_y, reach_x = TILE_H + 2 * (kernel_y - 1), TILE_W + 2 * (kernel_x - 1)
    blocks = tl.cdiv(reach_y * reach_x, BLOCK)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    split = tl.program_id(0) // blocks // heads
    q += head * q_h
    k += head * k_h
    v += head * v_h
    dout += head * do_h
    bias += head * (2 * kernel_y - 1) * (2 * kernel_x - 1)
    tiles = dh * dw * tl.cdiv(tl.cdiv(H, dh), TILE_H) * tl.cdiv(tl.cdiv(W, dw), TILE_W)
    i = tl.arange(0, TILE_H * TILE_W)
    start = tl.program_id(0) % blocks * BLOCK
    j = start + tl.arange(0, BLOCK)
    place_y, place_x = j // reach_x - kernel_y + 1, j % reach_x - kernel_x + 1  # of keys, from a tile's corner
    top, bottom = start // reach_x - kernel_y + 1, (start + BLOCK - 1) // reach_x - kernel_y + 1

    result = tl.zeros((TILE_H * TILE_W, BLOCK), tl.float32)
    share = tl.cdiv(items, splits)
    for item in range(split * share, tl.minimum((split + 1) * share, items)):
        b = (item // tiles).to(tl.int64)
        class_y, class_x, corner_y, corner_x, size_y, size_x = _tile(item % tiles, H, W, dh, dw, TILE_H, TILE_W)
        first_y, count_y = _keys_of(corner_y, TILE_H, size_y, kernel_y)
        if (corner_y + bottom >= first_y) & (corner_y + top < first_y + count_y):
            qy, qx = corner_y + i // TILE_W, corner_x + i % TILE_W
            is_query = (qy < size_y) & (qx < size_x)
            n = (qy * dh + class_y) * W + qx * dw + class_x
            window_y = tl.where(is_query, _window(qy, size_y, kernel_y), NOWHERE)
            window_x = _window(qx, size_x, kernel_x)
            ky, kx = corner_y + place_y, corner_x + place_x
            is_key = (ky >= 0) & (ky < size_y) & (kx >= 0) & (kx < size_x)
            s = (ky * dh + class_y) * W + kx * dw + class_x
            n_at, s_at = n.to(tl.int64), s.to(tl.int64)
            q_at, do_at, k_at, v_at = q + b * q_b, dout + b * do_b, k + b * k_b, v + b * v_b
            queries = load_rows(q_at, n, q_n, is_query, D, BLOCK_D)
            grads = load_rows(do_at, n, do_n, is_query, DV, BLOCK_DV)
            keys = load_rows(k_at, s, k_n, is_key, D, BLOCK_D)
            values = load_rows(v_at, s, v_n, is_key, DV, BLOCK_DV)
            at = (b * heads + head) * H * W + n
            peak, inverse = load_stats(stats, at, is_query)
            row_sum = tl.load(sums + at, mask=is_query, other=0.0)
            match = products(queries, keys, q_at, n_at * q_n, is_query, k_at, s_at * k_n, is_key, D, BLOCK_D)
            logits = _add_bias(
                match * scale2,
                *(qy[:, None], qx[:, None], window_y[:, None], window_x[:, None], ky[None, :], kx[None, :]),
                *(bias, kernel_y, kernel_x),
            )
            attn = tl.exp2(logits - peak[:, None]) * inverse[:, None]
            dattn = products(grads, values, do_at, n_at * do_n, is_query, v_at, s_at * v_n, is_key, DV, BLOCK_DV)
            result += attn * (dattn - row_sum[:, None])
    places = reach_y * reach_x
    at = ((split * heads + head) * (TILE_H * TILE_W) + i)[:, None] * places + j[None, :]
    tl.store(partial + at, result, mask=(j < places)[None, :])
