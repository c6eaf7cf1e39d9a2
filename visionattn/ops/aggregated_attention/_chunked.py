"""For many pooled tokens: their weights in chunks of tokens that stay in the cache.

The backward pass computes them again. Kept are the windows' weights and what the pool adds to the result: nothing
quadratic.
"""

import math
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.ops._autocast import exact_bmm
from visionattn.ops._register import differentiable
from visionattn.ops._tiles import even, shares
from visionattn.ops.aggregated_attention._window import Window, fake_gradients, planes_like

CHUNK_BYTES = {"cpu": 2**22}  # of weights in a chunk: two and their biases in a last-level cache, and few chunks
CHUNK_BYTES_ELSEWHERE = 2**28


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


class _Pool:
    """The softmax over pooled tokens, chunk by chunk.

    The window takes part as one more pooled token, the last, whose logit is the logsumexp of the window's: its weight
    is what the window's softmax is multiplied by. Queries have that logit as one more channel, in which the last key is
    one and the others are zero; so it comes with the product.

    Args:
        q: Queries as planes ``(B, h, d, N)``.
        k_pool: ``(B, h, P, d)``.
        bias_pool: ``(h, N, P)``.
        window: The logit of the window, ``(B, h, 1, N)``.
    """

    def __init__(self, q: Tensor, k_pool: Tensor, bias_pool: Tensor, window: Tensor) -> None:
        self.bias, self.q = bias_pool, torch.cat([q, window], dim=2)
        self.k = F.pad(k_pool.to(q.dtype), (0, 1, 0, 1))
        self.k[..., -1, -1] = 1
        self.budget = CHUNK_BYTES.get(q.device.type, CHUNK_BYTES_ELSEWHERE)

    def chunks(self) -> Iterator[_Chunk]:
        """Cut the work so that a chunk's weights fit the cache."""
        B, h, _, N = self.q.shape
        row = self.k.shape[2] * self.q.element_size()
        tokens = max(1, min(N, even(N, self.budget // row)))
        heads = max(1, min(h, self.budget // (row * N))) if tokens == N else 1
        images = max(1, min(B, self.budget // (row * N * h))) if heads == h else 1
        for b in range(0, B, images):
            for g in range(0, h, heads):
                for t in range(0, N, tokens):
                    yield _Chunk(
                        slice(b, min(b + images, B)), slice(g, min(g + heads, h)), slice(t, min(t + tokens, N))
                    )

    def buffer(self) -> Tensor:
        """Memory for the rows of the largest chunk, taken once."""
        sizes = [[s.stop - s.start for s in chunk] for chunk in islice(self.chunks(), 1)]
        return self.q.new_empty(sum(math.prod(s) for s in sizes) * self.k.shape[2])

    def rows(self, buffer: Tensor, chunk: _Chunk, columns: int) -> Tensor:
        """The place of a chunk's rows ``(G, n, columns)`` in what `buffer` took."""
        images, heads, tokens = (s.stop - s.start for s in chunk)
        return buffer[: images * heads * tokens * columns].view(images * heads, tokens, columns)

    def softmax(self, chunk: _Chunk, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """The weights of pooled tokens ``(G, n, P)`` and of the window ``(G, n)``; both in ``buffer``."""
        attn = self.rows(buffer, chunk, self.k.shape[2])
        q = chunk.of(self.q)[..., chunk.tokens].transpose(1, 2)
        _multiply(q, chunk.of(self.k).transpose(1, 2), out=attn)
        pooled = attn[..., :-1]
        chunk.by_head(pooled).add_(self.bias[chunk.heads, chunk.tokens])
        torch.softmax(attn, dim=2, out=attn)
        return pooled, attn[..., -1]


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write ``a @ b`` of ``(G, n, d)`` and ``(G, d, columns)``, each thread rows of its own."""
    a = shares(a)
    torch.bmm(a, b.expand(len(a), -1, -1), out=shares(out))


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a^T b``, of ``(G, n, d)`` and weights ``(G, n, P)``, to ``(G, d, P)``; each thread sums rows of its own.

    The result lies with ``P`` last: the narrow factor is transposed then, not the weights, in half the time.
    """
    a, b = shares(a), shares(b)
    if len(a) == len(out):
        out.baddbmm_(a.transpose(1, 2), b)
    else:
        out += exact_bmm(a.transpose(1, 2), b).sum(dim=0, keepdim=True)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the result; the windows' weights and their logits in the pool; what the pool adds to the result."""
    window = Window(q, bias_local.shape[1])
    queries, v_pool = window.plane(q), v_pool.to(window.dtype)
    local = queries.new_empty(*queries.shape[:2], window.cells, window.N)
    window.logits(queries, window.padded(k), bias_local, out=local)
    logit, share = local.logsumexp(dim=2, keepdim=True), queries.new_empty(*queries.shape[:2], window.N)
    torch.softmax(local, dim=2, out=local)
    pool = _Pool(queries, k_pool, bias_pool, logit)
    pooled = queries.new_empty(*queries.shape[:2], window.N, v.shape[-1])
    buffer = pool.buffer()
    for chunk in pool.chunks():
        attn, of_window = pool.softmax(chunk, buffer)
        chunk.of(share)[..., chunk.tokens] = of_window
        _multiply(attn, chunk.of(v_pool), out=chunk.of(pooled)[:, chunk.tokens])
    local *= share[:, :, None]
    out = pooled.transpose(2, 3).clone(memory_format=torch.contiguous_format)
    window.gather(out, window.weights(local, extra), window.padded(v))
    return window.map(out).to(v.dtype), local, logit, pooled


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
    local: Tensor,
    logit: Tensor,
    pooled: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Softmax's gradient is ``attn * (dattn - mean)``; ``mean`` is the sum of ``attn * dattn`` over window and pool.

    The pool's part of that sum is the product of ``dout`` and what the pool adds to the result.
    """
    window = Window(q, bias_local.shape[1])
    queries, keys, values, grads = window.plane(q), window.padded(k), window.padded(v), window.plane(dout)
    dlocal = torch.empty_like(local)
    window.products(grads, values, dlocal)
    dextra = dout.new_empty(0)
    if extra is not None:
        window.fill_beside(dlocal, 0.0)
        dextra = window.map(dlocal.clone()).to(extra.dtype)
    mean = (local * dlocal).sum(dim=2, keepdim=True)
    mean += (pooled.transpose(2, 3) * grads).sum(dim=2, keepdim=True)
    dlocal.sub_(mean).mul_(local)
    grads_and_mean = torch.cat([grads, -mean], dim=2)
    values_and_one = F.pad(v_pool.to(window.dtype), (0, 1), value=1.0)  # their product is dattn - mean
    pool = _Pool(queries, k_pool, bias_pool, logit)
    B, h, P, d = k_pool.shape
    keys_pool, dq = k_pool.to(window.dtype), queries.new_empty(B, h, window.N, d)
    dk_pool, dv_pool = queries.new_zeros(B, h, d, P), queries.new_zeros(B, h, v.shape[-1], P)
    dbias_pool = (queries.new_empty if B == 1 else queries.new_zeros)(bias_pool.shape)
    buffers = pool.buffer(), pool.buffer()
    for chunk in pool.chunks():
        at = chunk.tokens
        attn, _ = pool.softmax(chunk, buffers[0])
        grad = chunk.of(grads_and_mean)[..., at].transpose(1, 2)  # (G, n, dv + 1)
        _add_product(chunk.of(dv_pool), grad[..., :-1], attn)
        dlogits = pool.rows(buffers[1], chunk, attn.shape[2])
        _multiply(grad, chunk.of(values_and_one).transpose(1, 2), out=dlogits)
        if B == 1:
            dlogits = torch.mul(attn, dlogits, out=dbias_pool[chunk.heads, at])
        else:
            dlogits *= attn
            dbias_pool[chunk.heads, at] += chunk.by_head(dlogits).sum(dim=0)
        _add_product(chunk.of(dk_pool), chunk.of(queries)[..., at].transpose(1, 2), dlogits)
        _multiply(dlogits, chunk.of(keys_pool), out=chunk.of(dq)[:, at])
    dq = dq.transpose(2, 3).contiguous()
    dq, dk, dv = window.gradients(queries, keys, grads, dq, dlocal, window.weights(local, extra))
    return (
        dq.to(q.dtype),
        dk.to(k.dtype),
        dv.to(v.dtype),
        dk_pool.transpose(2, 3).contiguous().to(k.dtype),
        dv_pool.transpose(2, 3).contiguous().to(v.dtype),
        dlocal.sum(dim=(0, 3)).to(bias_local.dtype),
        dbias_pool.to(bias_pool.dtype),
        dextra,
    )


def _fake(
    q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, bias_local: Tensor, *_: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, h, H, W, dv), cells = v.shape, bias_local.shape[1]
    shapes = (B, h, cells, H * W), (B, h, 1, H * W), (B, h, H * W, dv)
    exact = torch.promote_types(q.dtype, torch.float32)
    local, logit, pooled = (q.new_empty(shape, dtype=exact) for shape in shapes)
    return planes_like(v), local, logit, pooled


# The chunk loop is opaque to compilers: its trip count depends on the shape and must not be unrolled.
chunked = differentiable(
    "aggregated_attention_chunked", _forward, _fake, _backward, fake_backward=fake_gradients, save=[1, 2, 3]
)
