"""For small maps: products of a row of queries with all keys near it, of which windows are a band.

With zeros around the list of a map's tokens, cell ``(i, j)`` of token ``x`` of a row lies ``x + i * W + j`` places
after that row's first cell. Of a matrix of a row's tokens by the places near it, ``(W, L)``, the windows are therefore
one strided view. Reading it, or writing it into zeros, turns sums over windows into a few products of matrices. They
multiply more numbers than sums over shifted maps do, and take less time as long as those are many small calls.

A window must not be wider than the map, or its cells would share places.
"""

import math

import torch
from torch import Tensor

from visionattn.ops._register import differentiable
from visionattn.ops.aggregated_attention._outside import fill_beside, fill_outside


class _Rows:
    """Rows of maps, ``(G, H)`` of them in ``G`` groups (a head of an image each), in the arithmetic's precision."""

    def __init__(self, q: Tensor, cells: int) -> None:
        self.B, self.h, self.H, self.W, _ = q.shape
        self.groups, self.side, self.cells = self.B * self.h, math.isqrt(cells), cells
        self.near = self.side * (self.W + 1) - 1  # L: from a row's first cell to its last
        self.margin = self.side // 2 * (self.W + 1)
        self.dtype, self.device = torch.promote_types(q.dtype, torch.float32), q.device

    def tokens(self, x: Tensor) -> Tensor:
        """``(B, h, ..., d)`` to contiguous ``(G, ..., d)``."""
        return x.to(self.dtype).contiguous().flatten(0, 1)

    def neighbours(self, x: Tensor) -> Tensor:
        """``(B, h, H, W, d)`` to what is near each row, ``(G * H, L, d)``; zeros above and below the map."""
        tokens, d = self.H * self.W, x.shape[-1]
        padded = x.new_zeros(self.groups, tokens + 2 * self.margin, d, dtype=self.dtype)
        padded[:, self.margin : self.margin + tokens].view(x.shape).copy_(x)
        return self._of_rows(padded, self.near).reshape(self.groups * self.H, self.near, d)

    def gathered(self, x: Tensor) -> Tensor:
        """Add up what concerns the neighbours of each row, ``(G * H, L, d)``: ``(B, h, H, W, d)``."""
        tokens, d = self.H * self.W, x.shape[-1]
        x = x.view(self.groups, self.H, self.near, d)
        padded = x.new_zeros(self.groups, tokens + 2 * self.margin, d)
        for start in range(0, self.near, self.W):  # within a row's width, rows do not overlap
            part = x[:, :, start : start + self.W]
            self._of_rows(padded[:, start:], part.shape[2]).add_(part)
        inner = padded[:, self.margin : self.margin + tokens]
        return inner.contiguous().view(self.B, self.h, self.H, self.W, d)

    def _of_rows(self, padded: Tensor, length: int) -> Tensor:
        """The ``length`` places from each row's first on, of ``(G, places, d)``: ``(G, H, length, d)``, a view."""
        group, place, channel = padded.stride()
        shape = (self.groups, self.H, length, padded.shape[2])
        return padded.as_strided(shape, (group, self.W * place, place, channel), padded.storage_offset())

    def matrix(self) -> tuple[Tensor, Tensor]:
        """Memory for a matrix of each row, ``(G * H, W, L)``, and its windows, ``(G, H, W, side, side)``."""
        W, L = self.W, self.near
        matrix = torch.empty(self.groups * self.H, W, L, dtype=self.dtype, device=self.device)
        strides = (self.H * W * L, W * L, L + 1, W, 1)
        return matrix, matrix.as_strided((self.groups, self.H, W, self.side, self.side), strides)

    def windows(self, x: Tensor) -> Tensor:
        """The first of columns ``(G, N, columns)`` as windows: ``(G, H, W, side, side)``."""
        return x[..., : self.cells].view(self.groups, self.H, self.W, self.side, self.side)

    def rows(self, x: Tensor) -> Tensor:
        """``(G, N, d)`` to ``(G * H, W, d)``."""
        return x.view(self.groups * self.H, self.W, x.shape[-1])

    def write(self, band: Tensor, attn: Tensor, extra: Tensor | None) -> None:
        """Write what the window's values are multiplied by, zero outside the map, into the windows of a matrix."""
        if extra is None:
            band.copy_(self.windows(attn))
        else:  # above and below there are zeros to be multiplied
            torch.add(self.windows(attn), extra.reshape(band.shape), out=band)
            fill_beside(_cells_first(band), 0.0)


def _cells_first(windows: Tensor) -> Tensor:
    """``(G, H, W, side, side)`` to ``(G, side, side, H, W)``, a view."""
    return windows.permute(0, 3, 4, 1, 2)


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
    bias = bias_local.view(-1, 1, 1, rows.side, rows.side)
    torch.add(band.unflatten(0, by_head), bias, out=local.unflatten(0, by_head))
    fill_outside(_cells_first(local), -math.inf)
    torch.bmm(queries, rows.tokens(k_pool).transpose(1, 2), out=pooled)
    pooled.unflatten(0, by_head).add_(bias_pool)
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
        inside = dlocal.clone(memory_format=torch.contiguous_format)
        fill_beside(_cells_first(inside), 0.0)
        dextra = inside.view(extra.shape).to(extra.dtype)
    matrix.zero_()
    rows.write(band, attn, extra)
    dv = rows.gathered(_product(matrix.transpose(1, 2), rows.rows(grads)))
    torch.bmm(grads, rows.tokens(v_pool).transpose(1, 2), out=dpooled)
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
        dlocal.unflatten(0, by_head).sum(dim=(0, 2, 3)).flatten(1).to(bias_local.dtype),
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
