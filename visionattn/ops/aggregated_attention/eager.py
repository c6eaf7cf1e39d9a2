"""Fast plain PyTorch: a sum over the shifted maps of keys and values, in chunks that stay in the cache.

Maps travel as planes, ``(B, heads, d, tokens)``: a neighbour is then a flat offset, one contiguous run for all tokens.
Where that offset runs over the end of a row it meets a wrong token, whose weight is zero anyway: it lies outside the
map. The backward pass computes the weights again, so that nothing quadratic is kept, unless they are as few as the
channels: those are kept. Small maps take another way, that of `_banded`.
"""

import math
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from visionattn.ops._crossovers import first_wins
from visionattn.ops._dispatch import exporting
from visionattn.ops._register import differentiable
from visionattn.ops._tiles import tiles
from visionattn.ops.aggregated_attention._banded import banded
from visionattn.ops.aggregated_attention._outside import fill_beside, fill_outside

BANDS_WIN = "aggregated_attention: columns of the map; bands, planes"
CHUNK_BYTES = {"cpu": 2**22}  # of weights in a chunk: two and their biases in a last-level cache, and few chunks
CHUNK_BYTES_ELSEWHERE = 2**28
STRIDED_BYTES = 2**19  # of columns that are copied at once
KEPT = 4  # weights a token and channel that are kept for the backward pass: as many numbers as q, k, v and the result


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
) -> str | None:
    """Everything runs, but the chunk loop cannot be exported."""
    return "its chunk loop is opaque to exporters" if exporting() else None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
) -> Tensor:
    """Attend by bands, or chunk by chunk."""
    tensors = (q, k, v, k_pool, v_pool, bias_local, bias_pool, extra)
    few = bias_local.shape[1] + k_pool.shape[2] <= KEPT * q.shape[-1]
    if few and first_wins(BANDS_WIN, q.shape[3], q):
        by_bands: Tensor = banded(*tensors)
        return by_bands
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    out: Tensor = _aggregated(*tensors, few and differentiated)
    return out


class _Chunk(NamedTuple):
    """Some images, some heads (all, if more than one image), some tokens (all, if more than one head)."""

    images: slice
    heads: slice
    tokens: slice

    def of(self, x: Tensor) -> Tensor:
        """``(B, h, ...)`` to ``(G, ...)``: the images and heads of this chunk."""
        return x[self.images, self.heads].flatten(0, 1)

    def by_head(self, x: Tensor) -> Tensor:
        """``(G, ...)`` to ``(images, heads, ...)``."""
        return x.unflatten(0, (-1, self.heads.stop - self.heads.start))


class _Window:
    """Maps as planes, ``(B, h, channels, N)``, in the precision of the arithmetic, and sums over windows of them."""

    def __init__(self, q: Tensor, cells: int) -> None:
        self.B, self.h, self.H, self.W, _ = q.shape
        self.N, self.cells = self.H * self.W, cells
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.side = math.isqrt(cells)
        r = self.side // 2
        self.margin = r * (self.W + 1)
        steps = range(-r, r + 1)
        self.offsets = [self.margin + y * self.W + x for y in steps for x in steps]

    def plane(self, x: Tensor) -> Tensor:
        """``(B, h, H, W, d)`` to contiguous ``(B, h, d, N)``."""
        return x.flatten(2, 3).transpose(2, 3).to(self.dtype).contiguous()

    def padded(self, x: Tensor) -> Tensor:
        """As `plane`, with a margin of zeros as wide as the farthest neighbour at both ends."""
        out = x.new_empty(*x.shape[:2], x.shape[4], self.N + 2 * self.margin, dtype=self.dtype)
        out[..., : self.margin] = out[..., self.margin + self.N :] = 0
        self.inner(out).copy_(x.flatten(2, 3).transpose(2, 3))
        return out

    def inner(self, x: Tensor) -> Tensor:
        """Take the margin off: ``(B, h, d, N)``."""
        return x[..., self.margin : self.margin + self.N]

    def map(self, x: Tensor) -> Tensor:
        """``(B, h, d, N)`` to ``(B, h, H, W, d)``."""
        return x.transpose(2, 3).unflatten(2, (self.H, self.W))

    def windows(self, x: Tensor) -> Tensor:
        """``(..., cells, N)`` to ``(..., side, side, H, W)``."""
        return x.view(*x.shape[:-2], self.side, self.side, self.H, self.W)

    def parts(self, x: Tensor, padded: Tensor) -> Iterator[tuple[tuple[slice, ...], Tensor, list[Tensor]]]:
        """Cut planes and their padded neighbours so that what is at work on them fits the cache.

        Yields where the part lies in a tensor ``(G, ...)``, the part of the planes ``(g, d, n)``, and the neighbours of
        its tokens, one view as large for each cell of the window.
        """
        x, padded = x.flatten(0, 1), padded.flatten(0, 1)
        at_work = 4 * x.shape[1]  # planes: a product has two factors, a sum and a buffer
        for group, tokens in tiles(len(x), self.N, at_work, x.element_size()):
            own, near = x[group, :, tokens], padded[group]
            shifts = [near.narrow(2, tokens.start + o, own.shape[2]) for o in self.offsets]
            yield (group, slice(None), tokens), own, shifts

    def products(self, x: Tensor, padded: Tensor) -> Tensor:
        """Dot products with the neighbours: ``(B, h, cells, N)``."""
        out = x.new_empty(self.B, self.h, self.cells, self.N)
        for at, own, shifts in self.parts(x, padded):
            scratch = torch.empty_like(own)
            for product, neighbours in zip(out.flatten(0, 1)[at].unbind(1), shifts, strict=True):
                torch.mul(own, neighbours, out=scratch)
                torch.sum(scratch, dim=1, out=product)
        return out

    def gather(self, out: Tensor, weights: Tensor, padded: Tensor) -> None:
        """Add the neighbours, weighted by ``(B, h, cells, N)``, to ``out``."""
        for at, own, shifts in self.parts(out, padded):
            for weight, neighbours in zip(weights.flatten(0, 1)[at].unsqueeze(2).unbind(1), shifts, strict=True):
                own.addcmul_(weight, neighbours)

    def scatter(self, x: Tensor, weights: Tensor, padded: Tensor) -> None:
        """Add ``x``, weighted by ``(B, h, cells, N)``, to the neighbours in ``padded``."""
        for at, own, shifts in self.parts(x, padded):
            for weight, neighbours in zip(weights.flatten(0, 1)[at].unsqueeze(2).unbind(1), shifts, strict=True):
                neighbours.addcmul_(weight, own)


class _Softmax:
    """The one softmax over windows and pooled tokens, in chunks of tokens; rows ``cells + P`` long, the window first.

    Args:
        q: Queries as planes ``(B, h, d, N)``.
        local: The windows' logits ``(B, h, cells, N)``; each chunk's weights take their place.
        k_pool: ``(B, h, P, d)``.
        bias_pool: ``(h, N, P)``.
    """

    def __init__(self, q: Tensor, local: Tensor, k_pool: Tensor, bias_pool: Tensor) -> None:
        self.q, self.local, self.k_pool, self.bias_pool = q, local, k_pool, bias_pool
        self.cells, self.columns = local.shape[2], local.shape[2] + k_pool.shape[2]
        self.budget = CHUNK_BYTES.get(q.device.type, CHUNK_BYTES_ELSEWHERE)

    def chunks(self) -> Iterator[_Chunk]:
        """Cut the work so that a chunk's weights fit the cache."""
        B, h, _, N = self.q.shape
        row = self.columns * self.q.element_size()
        tokens = max(1, min(N, self.budget // row))
        heads = max(1, min(h, self.budget // (row * N))) if tokens == N else 1
        images = max(1, min(B, self.budget // (row * N * h))) if heads == h else 1
        for b in range(0, B, images):
            for g in range(0, h, heads):
                for t in range(0, N, tokens):
                    yield _Chunk(
                        slice(b, min(b + images, B)), slice(g, min(g + heads, h)), slice(t, min(t + tokens, N))
                    )

    def buffer(self, keep: bool = False) -> Tensor:
        """Memory for rows: the largest chunk's, taken once, or all, ``(B, h, N, cells + P)``."""
        if keep:
            B, h, _, N = self.q.shape
            return self.q.new_empty(B, h, N, self.columns)
        sizes = [[s.stop - s.start for s in chunk] for chunk in islice(self.chunks(), 1)]
        return self.q.new_empty(sum(math.prod(s) for s in sizes) * self.columns)

    def rows(self, buffer: Tensor, chunk: _Chunk) -> Tensor:
        """The place of a chunk's rows ``(G, n, cells + P)`` in what `buffer` took."""
        if buffer.ndim == 4:
            return chunk.of(buffer)[:, chunk.tokens]
        images, heads, tokens = (s.stop - s.start for s in chunk)
        return buffer[: images * heads * tokens * self.columns].view(images * heads, tokens, self.columns)

    def weights(self, chunk: _Chunk, out: Tensor) -> Tensor:
        """The softmax of a chunk's tokens ``(G, n, cells + P)``, in ``out``."""
        q, local = (chunk.of(x)[..., chunk.tokens] for x in (self.q, self.local))
        _copy_columns(local.transpose(1, 2), out)
        pooled = torch.bmm(q.transpose(1, 2), chunk.of(self.k_pool).transpose(1, 2), out=out[..., self.cells :])
        chunk.by_head(pooled).add_(self.bias_pool[chunk.heads, chunk.tokens])
        torch.softmax(out, dim=2, out=out)
        _copy_columns(out, local.transpose(1, 2))
        return out


def _copy_columns(source: Tensor, target: Tensor) -> None:
    """Copy the first columns of rows ``(G, n, columns)``, as many as the narrower of the two has."""
    count = min(source.shape[2], target.shape[2])
    if source[..., 0].numel() * count * source.element_size() <= STRIDED_BYTES:
        target[..., :count] = source[..., :count]
        return
    for i in range(count):  # one strided run after the other is faster where they are long
        target[..., i] = source[..., i]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    window = _Window(q, bias_local.shape[1])
    queries, values, v_pool = window.plane(q), window.padded(v), v_pool.to(window.dtype)
    softmax = _softmax(window, queries, window.padded(k), k_pool, bias_local, bias_pool)
    out = queries.new_empty(*queries.shape[:2], v.shape[-1], window.N)
    buffer = softmax.buffer(keep)
    for chunk in softmax.chunks():
        attn = softmax.weights(chunk, softmax.rows(buffer, chunk))
        pooled = chunk.of(out)[..., chunk.tokens]  # (G, dv, n)
        torch.bmm(chunk.of(v_pool).transpose(1, 2), attn[..., window.cells :].transpose(1, 2), out=pooled)
    window.gather(out, _local_weights(window, softmax.local, extra), values)
    return window.map(out).to(v.dtype), buffer if keep else out.new_empty(0)


def _softmax(window: _Window, q: Tensor, k: Tensor, k_pool: Tensor, bias_local: Tensor, bias_pool: Tensor) -> _Softmax:
    local = window.products(q, k)
    local += bias_local[..., None]
    fill_outside(window.windows(local), -math.inf)
    return _Softmax(q, local, k_pool.to(window.dtype).contiguous(), bias_pool)


def _local_weights(window: _Window, attn: Tensor, extra: Tensor | None) -> Tensor:
    """What the window's values are multiplied by: ``(B, h, cells, N)``, zero outside the map."""
    if extra is None:
        return attn
    x = extra.flatten(2, 3).transpose(2, 3)
    weights = torch.add(attn, x, out=torch.empty_like(attn))
    fill_beside(window.windows(weights), 0.0)  # above and below, the margin's zeros are met
    return weights


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
    keep: bool,
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    window = _Window(q, bias_local.shape[1])
    queries, keys, values, grads = window.plane(q), window.padded(k), window.padded(v), window.plane(dout)
    values_pool = v_pool.to(window.dtype).contiguous()
    if keep:
        local = queries.new_empty(*queries.shape[:2], window.cells, window.N)
        softmax = _Softmax(queries, local, k_pool.to(window.dtype).contiguous(), bias_pool)
    else:
        softmax = _softmax(window, queries, keys, k_pool, bias_local, bias_pool)
    dlocal = window.products(grads, values)
    dextra = dout.new_empty(0)
    if extra is not None:
        inside = dlocal.clone()
        fill_beside(window.windows(inside), 0.0)
        dextra = window.map(inside).to(extra.dtype)
    dq, dk_pool, dv_pool = torch.empty_like(queries), torch.zeros_like(softmax.k_pool), torch.zeros_like(values_pool)
    dbias_pool = (queries.new_empty if window.B else queries.new_zeros)(bias_pool.shape)  # the first image sets it
    buffers = kept if keep else softmax.buffer(), softmax.buffer()
    for chunk in softmax.chunks():
        at, c = chunk.tokens, window.cells
        grad = chunk.of(grads)[..., at]  # (G, dv, n)
        attn, dattn = (softmax.rows(b, chunk) for b in buffers)  # (G, n, cells + P)
        if keep:
            _copy_columns(attn, chunk.of(softmax.local)[..., at].transpose(1, 2))
        else:
            softmax.weights(chunk, attn)
        chunk.of(dv_pool).baddbmm_(attn[..., c:].transpose(1, 2), grad.transpose(1, 2))
        columns = chunk.of(dlocal)[..., at].transpose(1, 2)  # (G, n, cells)
        _copy_columns(columns, dattn)
        torch.bmm(grad.transpose(1, 2), chunk.of(values_pool).transpose(1, 2), out=dattn[..., c:])
        dlogits = torch.ops.aten._softmax_backward_data.out(dattn, attn, 2, attn.dtype, grad_input=dattn)
        _copy_columns(dlogits, columns)
        pooled = dlogits[..., c:]
        by_head = chunk.by_head(pooled)
        by_head = by_head[0] if len(by_head) == 1 else by_head.sum(dim=0)
        if chunk.images.start == 0:
            dbias_pool[chunk.heads, at] = by_head
        else:
            dbias_pool[chunk.heads, at] += by_head
        chunk.of(dk_pool).baddbmm_(pooled.transpose(1, 2), chunk.of(queries)[..., at].transpose(1, 2))
        torch.bmm(chunk.of(softmax.k_pool).transpose(1, 2), pooled.transpose(1, 2), out=chunk.of(dq)[..., at])
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    window.scatter(grads, _local_weights(window, softmax.local, extra), dv)
    window.gather(dq, dlocal, keys)
    window.scatter(queries, dlocal, dk)
    return (
        window.map(dq).to(q.dtype),
        window.map(window.inner(dk).contiguous()).to(k.dtype),
        window.map(window.inner(dv).contiguous()).to(v.dtype),
        dk_pool.to(k.dtype),
        dv_pool.to(v.dtype),
        dlocal.sum(dim=(0, 3)).to(bias_local.dtype),
        dbias_pool.to(bias_pool.dtype),
        dextra,
    )


def _planes_like(x: Tensor) -> Tensor:
    """Fake result of `_Window.map`: ``(B, h, H, W, dim)`` that lies in memory as ``(B, h, dim, H, W)``."""
    B, h, H, W, dim = x.shape
    return x.new_empty(B, h, dim, H * W).transpose(2, 3).unflatten(2, (H, W))


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    B, h, H, W, _ = q.shape
    kept = (B, h, H * W, bias_local.shape[1] + k_pool.shape[2]) if keep else (0,)
    return _planes_like(v), q.new_empty(kept, dtype=torch.promote_types(q.dtype, torch.float32))


def _fake_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
    keep: bool,
    kept: Tensor,
) -> tuple[Tensor, ...]:
    return (
        *(_planes_like(x) for x in (q, k, v)),
        *(x.new_empty(x.shape) for x in (k_pool, v_pool, bias_local, bias_pool)),
        dout.new_empty(0) if extra is None else _planes_like(extra),
    )


# The chunk loop is opaque to compilers: its trip count depends on the shape and must not be unrolled.
_aggregated = differentiable(
    "aggregated_attention_chunked", _forward, _fake, _backward, fake_backward=_fake_backward, save=[1]
)
