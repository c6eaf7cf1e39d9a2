"""Triton: keys and values of the routed regions are read from the map; neither is gathered nor cut into regions."""

import torch
from torch import Tensor

from visionattn.kernels._layout import heads_last
from visionattn.ops._register import autocast, differentiable, why_not_triton


def why_not(q: Tensor, k: Tensor, v: Tensor, index: Tensor, grid: tuple[int, int], scale: float) -> str | None:
    """CUDA tensors in half or single precision, up to 256 channels a head."""
    return why_not_triton(q, k, v)


def forward(q: Tensor, k: Tensor, v: Tensor, index: Tensor, grid: tuple[int, int], scale: float) -> Tensor:
    """Attend in blocks."""
    return _attend(*autocast(q, k, v), index, *grid, scale)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, grid_h: int, grid_w: int, scale: float
) -> tuple[Tensor, Tensor]:
    from visionattn.kernels import routed_attention as kernels

    return kernels.forward(q, k, v, index, (grid_h, grid_w), scale)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, grid_h: int, grid_w: int, scale: float
) -> tuple[Tensor, Tensor]:
    B, h, H, W, _ = q.shape
    P = grid_h * grid_w
    stats = q.new_empty(B, h, P, (H // grid_h) * (W // grid_w), 2, dtype=torch.float32)
    return heads_last(v, v.shape), stats


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    grid_h: int,
    grid_w: int,
    scale: float,
    out: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from visionattn.kernels import routed_attention as kernels

    grads = kernels.backward(dout, q, k, v, index, (grid_h, grid_w), scale, out, stats)
    return *grads, index.new_empty(0)


def _fake_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    grid_h: int,
    grid_w: int,
    scale: float,
    out: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (heads_last(x, x.shape) for x in (q, k, v))
    return dq, dk, dv, index.new_empty(0)


_attend = differentiable(
    "routed_attention_triton", _forward, _fake, _backward, fake_backward=_fake_backward, save=[0, 1]
)
