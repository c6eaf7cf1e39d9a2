"""For small maps: products of a row of queries with all keys near it, of which windows are a band.

What is near a row of a map is listed column by column, with zeros outside the map. The window of the row's token ``x``
is then one run of that list, ``side`` places after that of token ``x - 1``, and of a matrix of a row's tokens by the
places near it, ``(W, L)``, the windows are one strided view. Reading it, or writing it into zeros, turns sums over
windows into a few products of matrices. They multiply more numbers than sums over shifted maps do, and take less time
as long as those are many small calls.

Windows here go column by column; those of arguments and gradients row by row.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.ops._register import differentiable
from visionattn.ops.aggregated_attention._outside import fill_outside


class _Rows:
    """Rows of maps, ``(G, H)`` of them in ``G`` groups (a head of an image each), in the arithmetic's precision."""

    def __init__(self, q: Tensor, cells: int) -> None:
        self.B, self.h, self.H, self.W, _ = q.shape
        self.groups, self.side, self.cells = self.B * self.h, math.isqrt(cells), cells
        self.radius = self.side // 2
        self.near = self.side * (self.W + 2 * self.radius)  # L
        self.dtype, self.device = torch.promote_types(q.dtype, torch.float32), q.device

    def tokens(self, x: Tensor) -> Tensor:
        """``(B, h, ..., d)`` to contiguous ``(G, ..., d)``."""
        return x.to(self.dtype).contiguous().flatten(0, 1)

    def neighbours(self, x: Tensor) -> Tensor:
        """``(B, h, H, W, d)`` to what is near each row, column by column: ``(G * H, L, d)``; zeros outside the map."""
        r = self.radius
        padded = F.pad(x.to(self.dtype), (0, 0, r, r, r, r)).flatten(0, 1)
        near = torch.cat([padded[:, i : i + self.H] for i in range(self.side)], dim=3)  # (G, H, W + 2r, side * d)
        return near.view(self.groups * self.H, self.near, x.shape[-1])

    def gathered(self, x: Tensor) -> Tensor:
        """Add up what concerns the neighbours of each row, ``(G * H, L, d)``: ``(B, h, H, W, d)``."""
        r, H, W = self.radius, self.H, self.W
        x = x.view(self.groups, H, W + 2 * r, self.side, x.shape[-1])[:, :, r : r + W]
        out = x[:, :, :, r].clone(memory_format=torch.contiguous_format)
        for below in range(1, min(r + 1, H)):  # rows between a row and its neighbours
            out[:, below:] += x[:, : H - below, :, r + below]
            out[:, : H - below] += x[:, below:, :, r - below]
        return out.view(self.B, self.h, H, W, x.shape[-1])

    def matrix(self) -> tuple[Tensor, Tensor]:
        """Memory for a matrix of each row, ``(G * H, W, L)``, and its windows, ``(G, H, W, cells)``."""
        W, L = self.W, self.near
        matrix = torch.empty(self.groups * self.H, W, L, dtype=self.dtype, device=self.device)
        strides = (self.H * W * L, W * L, L + self.side, 1)
        return matrix, matrix.as_strided((self.groups, self.H, W, self.cells), strides)

    def windows(self, x: Tensor) -> Tensor:
        """The first of columns ``(G, N, columns)`` as windows: ``(G, H, W, cells)``."""
        return x[..., : self.cells].view(self.groups, self.H, self.W, self.cells)

    def turned(self, x: Tensor) -> Tensor:
        """Windows ``(..., cells)`` that go row by row, or column by column, in the other order; a copy."""
        cells = torch.arange(self.cells, device=x.device).view(self.side, self.side)
        return x.index_select(-1, cells.t().flatten())

    def cells_first(self, x: Tensor) -> Tensor:
        """``(G, H, W, cells)`` to ``(G, side, side, H, W)``, row by row; a view."""
        return x.unflatten(3, (self.side, self.side)).permute(0, 4, 3, 1, 2)

    def rows(self, x: Tensor) -> Tensor:
        """``(G, N, d)`` to ``(G * H, W, d)``."""
        return x.view(self.groups * self.H, self.W, x.shape[-1])

    def write(self, band: Tensor, attn: Tensor, extra: Tensor | None) -> None:
        """Write what the window's values are multiplied by into the windows of a matrix; anything outside the map."""
        if extra is None:
            band.copy_(self.windows(attn))
        else:
            torch.add(self.windows(attn), self.turned(extra).view(band.shape), out=band)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in their own precision: autocast leaves results alone that have a place already."""
    return torch.bmm(a, b, out=a.new_empty(a.shape[0], a.shape[1], b.shape[2]))


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the result ``(B, h, H, W, dv)``, and the softmax ``(G, N, cells + P)``, the window first."""
    rows = _Rows(q, bias_local.shape[1])
    queries = rows.tokens(q).flatten(1, 2)  # (G, N, d)
    attn = queries.new_empty(*queries.shape[:2], rows.cells + k_pool.shape[2])
    local, pooled = rows.windows(attn), attn[..., rows.cells :]
    matrix, band = rows.matrix()
    torch.bmm(rows.rows(queries), rows.neighbours(k).transpose(1, 2), out=matrix)
    by_head = (rows.B, rows.h)
    bias = rows.turned(bias_local).view(-1, 1, 1, rows.cells)
    torch.add(band.unflatten(0, by_head), bias, out=local.unflatten(0, by_head))
    fill_outside(rows.cells_first(local), -math.inf)
    products = _product(queries, rows.tokens(k_pool).transpose(1, 2))
    torch.add(products.unflatten(0, by_head), bias_pool, out=pooled.unflatten(0, by_head))
    torch.softmax(attn, dim=2, out=attn)
    out = _product(pooled, rows.tokens(v_pool))
    matrix.zero_()
    rows.write(band, attn, extra)
    rows.rows(out).baddbmm_(matrix, rows.neighbours(v))
    return out.view(v.shape).to(v.dtype), attn


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
    attn: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = _Rows(q, bias_local.shape[1])
    queries, grads = (rows.tokens(x).flatten(1, 2) for x in (q, dout))  # (G, N, d)
    dlogits = torch.empty_like(attn)
    dlocal, dpooled = rows.windows(dlogits), dlogits[..., rows.cells :]
    matrix, band = rows.matrix()
    torch.bmm(rows.rows(grads), rows.neighbours(v).transpose(1, 2), out=matrix)
    dlocal.copy_(band)
    dextra = dout.new_empty(0)
    if extra is not None:
        dextra = rows.turned(dlocal).view(extra.shape).to(extra.dtype)
    matrix.zero_()
    rows.write(band, attn, extra)
    dv = rows.gathered(_product(matrix.transpose(1, 2), rows.rows(grads)))
    dpooled.copy_(_product(grads, rows.tokens(v_pool).transpose(1, 2)))
    torch.ops.aten._softmax_backward_data.out(dlogits, attn, 2, attn.dtype, grad_input=dlogits)
    dq = _product(dpooled, rows.tokens(k_pool))
    band.copy_(dlocal)  # what lies beside the band is still zero
    rows.rows(dq).baddbmm_(matrix, rows.neighbours(k))
    dk = rows.gathered(_product(matrix.transpose(1, 2), rows.rows(queries)))
    by_head = (rows.B, rows.h)
    return (
        dq.view(q.shape).to(q.dtype),
        dk.to(k.dtype),
        dv.to(v.dtype),
        _product(dpooled.transpose(1, 2), queries).view(k_pool.shape).to(k.dtype),
        _product(attn[..., rows.cells :].transpose(1, 2), grads).view(v_pool.shape).to(v.dtype),
        rows.turned(dlocal.unflatten(0, by_head).sum(dim=(0, 2, 3))).to(bias_local.dtype),
        dpooled.unflatten(0, by_head).sum(dim=0).to(bias_pool.dtype),
        dextra,
    )


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
) -> tuple[Tensor, Tensor]:
    B, h, H, W, _ = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    return v.new_empty(v.shape), q.new_empty(B * h, H * W, bias_local.shape[1] + k_pool.shape[2], dtype=exact)


# Opaque to compilers, which take views of bands for what they are not.
banded = differentiable("aggregated_attention_banded", _forward, _fake, _backward, save=[1])
