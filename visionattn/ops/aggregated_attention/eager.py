"""Fast plain PyTorch: a sum over the shifted maps of keys and values, in chunks that stay in the cache.

Maps travel as planes, ``(B, heads, d, tokens)``: a neighbour is then a flat offset, one contiguous run for all tokens.
Where that offset runs over the end of a row it meets a wrong token, whose weight is zero anyway: it lies outside the
map. The backward pass computes the weights again, so that nothing quadratic is kept.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visionattn.ops._dispatch import exporting

CHUNK_BYTES = {"cpu": 2**22}  # of weights in a chunk: within a last-level cache, and few enough chunks
CHUNK_BYTES_ELSEWHERE = 2**28


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
    """Attend chunk by chunk."""
    return _aggregated(q, k, v, k_pool, v_pool, bias_local, bias_pool, extra)


class _Chunk(NamedTuple):
    """Some images, some heads (all, if more than one image), some rows of the map (all, if more than one head)."""

    images: slice
    heads: slice
    rows: range

    def of(self, x: Tensor) -> Tensor:
        """``(B, h, ...)`` to ``(G, ...)``: the images and heads of this chunk."""
        return x[self.images, self.heads].flatten(0, 1)


class _Planes:
    """The inputs as planes in the precision of the arithmetic, and the steps that both passes share."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, bias_local: Tensor, bias_pool: Tensor
    ) -> None:
        self.B, self.h, self.H, self.W, self.d = q.shape
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.cells, self.P = bias_local.shape[1], k_pool.shape[2]
        window = math.isqrt(self.cells)
        self.r = window // 2
        self.margin = self.r * (self.W + 1)
        steps = range(-self.r, self.r + 1)
        self.offsets = [self.margin + y * self.W + x for y in steps for x in steps]
        self.q = self.plane(q)  # (B, h, d, N)
        self.k, self.v = self.padded(k), self.padded(v)  # (B, h, d, margin + N + margin)
        self.k_pool, self.v_pool = (x.to(self.dtype).contiguous() for x in (k_pool, v_pool))  # (B, h, P, d)
        self.bias_local = bias_local.to(self.dtype)[..., None]  # (h, cells, 1)
        self.bias_pool = bias_pool.transpose(1, 2)  # (h, P, N)

    def plane(self, x: Tensor) -> Tensor:
        """``(B, h, H, W, d)`` to contiguous ``(B, h, d, N)``."""
        return x.flatten(2, 3).transpose(2, 3).to(self.dtype).contiguous()

    def padded(self, x: Tensor) -> Tensor:
        """As `plane`, with a margin of zeros as wide as the farthest neighbour at both ends."""
        out = x.new_zeros(*x.shape[:2], x.shape[4], self.H * self.W + 2 * self.margin, dtype=self.dtype)
        self.inner(out).copy_(x.flatten(2, 3).transpose(2, 3))
        return out

    def inner(self, x: Tensor) -> Tensor:
        """Take the margin off: ``(B, h, d, N)``."""
        return x[..., self.margin : self.margin + self.H * self.W]

    def map(self, x: Tensor) -> Tensor:
        """``(B, h, d, N)`` to ``(B, h, H, W, d)``."""
        return x.transpose(2, 3).unflatten(2, (self.H, self.W))

    def chunks(self) -> Iterator[_Chunk]:
        """Cut the work so that a chunk's planes and weights fit the cache."""
        budget = CHUNK_BYTES.get(self.q.device.type, CHUNK_BYTES_ELSEWHERE)
        row = self.W * max(self.cells + self.P, self.d, self.v.shape[2]) * self.q.element_size()
        rows = max(1, min(self.H, budget // max(1, row)))
        heads = max(1, min(self.h, budget // max(1, row * self.H))) if rows == self.H else 1
        images = max(1, budget // max(1, row * self.H * self.h)) if heads == self.h else 1
        for b in range(0, self.B, images):
            for g in range(0, self.h, heads):
                for y in range(0, self.H, rows):
                    yield _Chunk(slice(b, b + images), slice(g, g + heads), range(y, min(y + rows, self.H)))

    def tokens(self, chunk: _Chunk) -> slice:
        """Where the tokens of a chunk lie in a plane."""
        return slice(chunk.rows.start * self.W, chunk.rows.stop * self.W)

    def shifts(self, padded: Tensor, chunk: _Chunk) -> list[Tensor]:
        """The neighbours of a chunk's tokens, one view ``(G, d, n)`` for each cell of the window."""
        x, at = chunk.of(padded), self.tokens(chunk)
        return [x[..., at.start + o : at.stop + o] for o in self.offsets]

    def fill_outside(self, x: Tensor, chunk: _Chunk, value: float) -> None:
        """Set the cells outside the map in ``x (G, cells, n)``."""
        window, (G, _, n) = 2 * self.r + 1, x.shape
        x = x.view(G, window, window, n // self.W, self.W)
        for i in range(self.r):  # the window's row and column i, and their mirror images
            reach = self.r - i
            x[:, :, i, :, :reach] = value
            x[:, :, -1 - i, :, max(0, self.W - reach) :] = value
            x[:, i, :, : max(0, reach - chunk.rows.start)] = value
            x[:, -1 - i, :, max(0, self.H - reach - chunk.rows.start) :] = value

    def weights(self, chunk: _Chunk) -> Tensor:
        """The softmax of a chunk's tokens ``(G, cells + P, n)``, the window first."""
        at, c = self.tokens(chunk), self.cells
        q = chunk.of(self.q)[..., at]  # (G, d, n)
        logits = q.new_empty(q.shape[0], c + self.P, q.shape[2])
        products(q, self.shifts(self.k, chunk), out=logits[:, :c])
        bias_local, bias_pool = self.bias_local[chunk.heads], self.bias_pool[chunk.heads, :, at]
        by_head = logits.unflatten(0, (-1, len(bias_local)))  # (images, heads, cells + P, n)
        by_head[:, :, :c].add_(bias_local)
        self.fill_outside(logits[:, :c], chunk, -math.inf)
        pooled = torch.bmm(chunk.of(self.k_pool), q).unflatten(0, by_head.shape[:2])  # (images, heads, P, n)
        torch.add(pooled, bias_pool, out=by_head[:, :, c:])
        return torch.softmax(logits, dim=1, out=logits)

    def local_weights(self, attn: Tensor, extra: Tensor | None, chunk: _Chunk) -> Tensor:
        """What the window's values are multiplied by: ``(G, cells, n)``."""
        local = attn[:, : self.cells]
        if extra is None:
            return local
        local = local + chunk.of(extra)[..., self.tokens(chunk)]
        self.fill_outside(local, chunk, 0.0)
        return local


def products(x: Tensor, shifts: list[Tensor], out: Tensor) -> None:
    """Dot products over channels with each shifted map: ``(G, d, n)`` and as many to ``out (G, cells, n)``."""
    scratch = torch.empty_like(x)
    for i, y in enumerate(shifts):
        torch.mul(x, y, out=scratch)
        torch.sum(scratch, dim=1, out=out[:, i])


# The chunk loop is opaque to compilers: its trip count depends on the shape and must not be unrolled.
_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor k_pool, Tensor v_pool, Tensor bias_local, Tensor bias_pool, Tensor? extra"
)
torch.library.define("visionattn::aggregated_attention_chunked", f"({_TENSORS}) -> Tensor")
torch.library.define(
    "visionattn::aggregated_attention_chunked_backward",
    f"({_TENSORS}, Tensor dout) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor?)",
)


@torch.library.impl("visionattn::aggregated_attention_chunked", "default")
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
) -> Tensor:
    s = _Planes(q, k, v, k_pool, v_pool, bias_local, bias_pool)
    added = None if extra is None else s.plane(extra)
    out = s.q.new_empty(*s.q.shape[:2], v.shape[-1], s.q.shape[3])
    for chunk in s.chunks():
        attn = s.weights(chunk)
        result = torch.bmm(chunk.of(s.v_pool).transpose(1, 2), attn[:, s.cells :])  # (G, dv, n)
        local = s.local_weights(attn, added, chunk)
        for i, values in enumerate(s.shifts(s.v, chunk)):
            result.addcmul_(local[:, i, None], values)
        chunk.of(out)[..., s.tokens(chunk)] = result
    return s.map(out).to(v.dtype)


@torch.library.impl("visionattn::aggregated_attention_chunked_backward", "default")
def _backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
    dout: Tensor,
) -> tuple[Tensor | None, ...]:
    s = _Planes(q, k, v, k_pool, v_pool, bias_local, bias_pool)
    added = None if extra is None else s.plane(extra)
    douts = s.plane(dout)
    dq, dk, dv = torch.empty_like(s.q), torch.zeros_like(s.k), torch.zeros_like(s.v)
    dk_pool, dv_pool = torch.zeros_like(s.k_pool), torch.zeros_like(s.v_pool)
    dbias_local, dbias_pool = torch.zeros_like(s.bias_local), s.bias_local.new_zeros(s.bias_pool.shape)
    dextra = None if added is None else torch.empty_like(added)
    for chunk in s.chunks():
        at, c = s.tokens(chunk), s.cells
        queries, grad = chunk.of(s.q)[..., at], chunk.of(douts)[..., at].contiguous()  # (G, d, n), (G, dv, n)
        attn = s.weights(chunk)  # (G, cells + P, n)
        for weights, dvalues in zip(s.local_weights(attn, added, chunk).unbind(1), s.shifts(dv, chunk), strict=True):
            dvalues.addcmul_(weights[:, None], grad)
        chunk.of(dv_pool).baddbmm_(attn[:, c:], grad.transpose(1, 2))
        dattn = torch.empty_like(attn)
        products(grad, s.shifts(s.v, chunk), out=dattn[:, :c])
        if dextra is not None:
            s.fill_outside(dattn[:, :c], chunk, 0.0)
            chunk.of(dextra)[..., at] = dattn[:, :c]
        torch.bmm(chunk.of(s.v_pool), grad, out=dattn[:, c:])
        dlogits = torch.ops.aten._softmax_backward_data(dattn, attn, 1, attn.dtype)
        by_head = dlogits.unflatten(0, (-1, len(dbias_local[chunk.heads])))  # (images, heads, cells + P, n)
        by_head = by_head[0] if by_head.shape[0] == 1 else by_head.sum(dim=0)
        dbias_local[chunk.heads].add_(by_head[:, :c].sum(dim=2, keepdim=True))
        dbias_pool[chunk.heads, :, at].add_(by_head[:, c:])
        dqueries = torch.bmm(chunk.of(s.k_pool).transpose(1, 2), dlogits[:, c:])
        chunk.of(dk_pool).baddbmm_(dlogits[:, c:], queries.transpose(1, 2))
        for weights, keys, dkeys in zip(
            dlogits[:, :c].unbind(1), s.shifts(s.k, chunk), s.shifts(dk, chunk), strict=True
        ):
            dqueries.addcmul_(weights[:, None], keys)
            dkeys.addcmul_(weights[:, None], queries)
        chunk.of(dq)[..., at] = dqueries
    return (
        s.map(dq).to(q.dtype),
        s.map(s.inner(dk).contiguous()).to(k.dtype),
        s.map(s.inner(dv).contiguous()).to(v.dtype),
        dk_pool.to(k.dtype),
        dv_pool.to(v.dtype),
        dbias_local[..., 0].to(bias_local.dtype),
        dbias_pool.transpose(1, 2).to(bias_pool.dtype).contiguous(),
        None if extra is None or dextra is None else s.map(dextra).to(extra.dtype),
    )


def _planes_like(x: Tensor, dim: int) -> Tensor:
    """Fake result of `_Planes.map`: ``(B, h, H, W, dim)`` that lies in memory as ``(B, h, dim, H, W)``."""
    B, h, H, W, _ = x.shape
    return x.new_empty(B, h, dim, H * W).transpose(2, 3).unflatten(2, (H, W))


@torch.library.register_fake("visionattn::aggregated_attention_chunked")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
) -> Tensor:
    return _planes_like(v, v.shape[-1])


@torch.library.register_fake("visionattn::aggregated_attention_chunked_backward")
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
    dout: Tensor,
) -> tuple[Tensor | None, ...]:
    return (
        *(_planes_like(x, x.shape[-1]) for x in (q, k, v)),
        *(x.new_empty(x.shape) for x in (k_pool, v_pool, bias_local, bias_pool)),
        None if extra is None else _planes_like(extra, extra.shape[-1]),
    )


class _Aggregated(torch.autograd.Function):
    @staticmethod
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
        return torch.ops.visionattn.aggregated_attention_chunked(q, k, v, k_pool, v_pool, bias_local, bias_pool, extra)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.visionattn.aggregated_attention_chunked_backward(*ctx.saved_tensors, dout)


_aggregated = _Aggregated.apply
