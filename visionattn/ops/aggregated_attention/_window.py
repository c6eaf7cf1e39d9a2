"""Maps as planes, and sums over the windows of their tokens.

In planes, ``(B, heads, channels, N)``, a neighbour is a flat offset, one contiguous run for all tokens. Where that
offset runs over the end of a row it meets a wrong token, whose weight is zero anyway: it lies outside the map.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from visionattn.ops._tiles import tiles


class Window:
    """Windows of ``cells`` tokens on maps like ``(B, h, H, W, d)``; arithmetic is in single precision at least."""

    def __init__(self, q: Tensor, cells: int) -> None:
        self.B, self.h, self.H, self.W, _ = q.shape
        self.N, self.cells, self.side = self.H * self.W, cells, math.isqrt(cells)
        self.margin = self.side // 2 * (self.W + 1)  # from a token to the farthest of its window
        self.dtype = torch.promote_types(q.dtype, torch.float32)

    def plane(self, x: Tensor) -> Tensor:
        """``(B, h, H, W, d)`` to contiguous ``(B, h, d, N)``."""
        return x.flatten(2, 3).transpose(2, 3).to(self.dtype).contiguous()

    def padded(self, x: Tensor) -> Tensor:
        """As `plane`, with a margin of zeros as wide as the farthest neighbour at both ends."""
        out = x.new_empty(*x.shape[:2], x.shape[4], self.N + 2 * self.margin, dtype=self.dtype)
        out[..., : self.margin].zero_()
        out[..., self.margin + self.N :].zero_()
        self.inner(out).copy_(x.flatten(2, 3).transpose(2, 3))
        return out

    def inner(self, x: Tensor) -> Tensor:
        """Take the margin off: ``(B, h, d, N)``."""
        return x[..., self.margin : self.margin + self.N]

    def map(self, x: Tensor) -> Tensor:
        """``(B, h, d, N)`` to ``(B, h, H, W, d)``."""
        return x.transpose(2, 3).unflatten(2, (self.H, self.W))

    def logits(self, q: Tensor, k: Tensor, bias: Tensor, out: Tensor) -> None:
        """Write those of planes ``q`` and padded ``k``, with the bias ``(h, cells)``; -inf outside the map."""
        self.products(q, k, out)
        out += bias[..., None]
        self.fill_outside(out, -math.inf)

    def gradients(
        self, q: Tensor, k: Tensor, grads: Tensor, dq: Tensor, dlogits: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return those of queries, keys and values as maps.

        Args:
            q: Queries, planes.
            k: Keys, padded.
            grads: The result's gradient, planes.
            dq: What the pool adds to the queries' gradient, planes; the window's part is added to it.
            dlogits: Of the window, ``(B, h, cells, N)``.
            weights: As `weights` returns them.
        """
        self.gather(dq, dlogits, k)
        dk, dv = torch.zeros_like(k), k.new_zeros(*grads.shape[:3], k.shape[3])
        self.scatter(q, dlogits, dk)
        self.scatter(grads, weights, dv)
        return self.map(dq), self.map(self.inner(dk).contiguous()), self.map(self.inner(dv).contiguous())

    def products(self, x: Tensor, padded: Tensor, out: Tensor) -> None:
        """Write the dot products with the neighbours: ``(B, h, cells, N)``."""
        at_work = (self.side + 1) * x.shape[2]  # planes, of which most are products
        by_row = out.unflatten(2, (self.side, self.side)).flatten(0, 1)
        for group, tokens, near in self._parts(padded, at_work):
            own = x.flatten(0, 1)[group, :, tokens]  # (G, d, n)
            scratch = own.new_empty(near.shape[1:])  # (G, side, d, n)
            for row, sums in zip(near.unbind(), by_row[group, ..., tokens].unbind(1), strict=True):
                torch.mul(own[:, None], row, out=scratch)
                torch.sum(scratch, dim=2, out=sums)

    def gather(self, out: Tensor, weights: Tensor, padded: Tensor) -> None:
        """Add the neighbours, weighted by ``(B, h, cells, N)``, to ``out``."""
        for group, tokens, near in self._parts(padded, 4 * out.shape[2]):
            own, weights_here = (x.flatten(0, 1)[group, :, tokens] for x in (out, weights))
            for weight, neighbours in zip(weights_here.unsqueeze(2).unbind(1), _each(near), strict=True):
                own.addcmul_(weight, neighbours)

    def scatter(self, x: Tensor, weights: Tensor, padded: Tensor) -> None:
        """Add ``x``, weighted by ``(B, h, cells, N)``, to the neighbours in ``padded``."""
        for group, tokens, near in self._parts(padded, 4 * x.shape[2]):
            own, weights_here = (x.flatten(0, 1)[group, :, tokens] for x in (x, weights))
            for weight, neighbours in zip(weights_here.unsqueeze(2).unbind(1), _each(near), strict=True):
                neighbours.addcmul_(weight, own)

    def weights(self, attn: Tensor, extra: Tensor | None) -> Tensor:
        """What the window's values are multiplied by: ``(B, h, cells, N)``, zero left and right of the map."""
        if extra is None:
            return attn
        weights = torch.add(attn, extra.flatten(2, 3).transpose(2, 3), out=attn.new_empty(attn.shape))
        self.fill_beside(weights, 0.0)  # above and below, the margin's zeros are met
        return weights

    def fill_beside(self, x: Tensor, value: float) -> None:
        """Set the cells of ``(B, h, cells, N)`` that lie left and right of the map."""
        r, cells = self.side // 2, self._cells(x)
        for i in range(r):  # the window's column i and its mirror image
            cells[..., i, :, : r - i].fill_(value)
            cells[..., -1 - i, :, max(0, self.W - r + i) :].fill_(value)

    def fill_outside(self, x: Tensor, value: float) -> None:
        """As `fill_beside`, and those above and below."""
        r, cells = self.side // 2, self._cells(x)
        for i in range(r):  # the window's row i and its mirror image
            cells[..., i, :, : r - i, :].fill_(value)
            cells[..., -1 - i, :, max(0, self.H - r + i) :, :].fill_(value)
        self.fill_beside(x, value)

    def _cells(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.side, self.side, self.H, self.W)

    def _parts(self, padded: Tensor, at_work: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Cut ``(G, d, N)`` so that ``at_work`` planes of a part fit the cache.

        Yields a part's groups, its tokens, and the neighbours of those for each cell of the window: overlapping views
        ``(side, G, side, d, n)`` of ``padded``, a row of the window first.
        """
        padded = padded.flatten(0, 1)
        for group, tokens in tiles(len(padded), self.N, at_work, padded.element_size()):
            first = padded[group, :, tokens]
            (G, d, n), (along_groups, along_d, _) = first.shape, first.stride()
            size, strides = (self.side, G, self.side, d, n), (self.W, along_groups, 1, along_d, 1)
            yield group, tokens, first.as_strided(size, strides)


def _each(near: Tensor) -> Iterator[Tensor]:
    for row in near.unbind():
        yield from row.unbind(1)


def planes_like(x: Tensor) -> Tensor:
    """Fake result of `Window.map`: ``(B, h, H, W, d)`` that lies in memory as ``(B, h, d, H, W)``."""
    B, h, H, W, d = x.shape
    return x.new_empty(B, h, d, H * W).transpose(2, 3).unflatten(2, (H, W))


def fake_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
    *saved: Tensor,
) -> tuple[Tensor, ...]:
    """Fake gradients of `aggregated_attention`'s arguments."""
    return (
        *(planes_like(x) for x in (q, k, v)),
        *(x.new_empty(x.shape) for x in (k_pool, v_pool, bias_local, bias_pool)),
        dout.new_empty(0) if extra is None else planes_like(extra),
    )
