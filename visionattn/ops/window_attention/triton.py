"""Triton: windows are read where they lie on the map, and one number a query is kept for the backward pass."""

import torch
from torch import Tensor

from visionattn.kernels._layout import heads_last
from visionattn.ops._register import autocast, differentiable, why_not_triton

Size = tuple[int, int]


def why_not(
    q: Tensor, k: Tensor, v: Tensor, window: Size, bias: Tensor | None, shift: Size, grid: bool, scale: float
) -> str | None:
    """CUDA tensors in half or single precision, up to 256 channels a head."""
    return why_not_triton(q, k, v)


def forward(
    q: Tensor, k: Tensor, v: Tensor, window: Size, bias: Tensor | None, shift: Size, grid: bool, scale: float
) -> Tensor:
    """Attend in blocks of windows, or blocks of a window."""
    q, k, v = autocast(q, k, v)
    bias = None if bias is None else bias.to(q.dtype).contiguous()
    return _attend(q, k, v, bias, list(window), list(shift), grid, scale)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: list[int], shift: list[int], grid: bool, scale: float
) -> tuple[Tensor, Tensor]:
    from visionattn.kernels import window_attention as kernels

    return kernels.forward(q, k, v, bias, window, shift, grid, scale)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: list[int], shift: list[int], grid: bool, scale: float
) -> tuple[Tensor, Tensor]:
    B, h, H, W, _ = q.shape
    return heads_last(v, (B, h, H, W, v.shape[4])), q.new_empty(B, h, H * W, 2, dtype=torch.float32)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: list[int],
    shift: list[int],
    grid: bool,
    scale: float,
    out: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from visionattn.kernels import window_attention as kernels

    return kernels.backward(dout, q, k, v, bias, window, shift, grid, scale, out, stats)


def _fake_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    window: list[int],
    shift: list[int],
    grid: bool,
    scale: float,
    out: Tensor,
    stats: Tensor,
) -> tuple[Tensor, ...]:
    dbias = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return (*(heads_last(x, x.shape) for x in (q, k, v)), dbias)


_attend = differentiable(
    "window_attention_triton", _forward, _fake, _backward, fake_backward=_fake_backward, save=[0, 1]
)
