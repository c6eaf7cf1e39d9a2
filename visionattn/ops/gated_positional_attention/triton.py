"""Triton: content in blocks, position one axis at a time with its weights computed in place, mixed as they end."""

import torch
from torch import Tensor

from visionattn.kernels._layout import heads_last
from visionattn.ops._register import autocast, differentiable, why_not_triton


def why_not(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, gate: Tensor, bias: Tensor | None, scale: float
) -> str | None:
    """CUDA tensors in half or single precision, up to 256 channels a head."""
    return why_not_triton(q, k, v)


def forward(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, gate: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """Attend in blocks and along lines."""
    return _attend(*autocast(q, k, v), position, gate, bias, scale)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, gate: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from visionattn.kernels import gated_positional_attention as kernels

    return kernels.forward(q, k, v, position, gate, scale)  # the bias cancels


def _fake(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, gate: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, h, H, W, _ = v.shape
    stats = v.new_empty(B, h, H * W, 2, dtype=torch.float32)
    return heads_last(v, v.shape), heads_last(v, v.shape), stats, v.new_empty(4, h, W + H, dtype=torch.float32)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    scale: float,
    content: Tensor,
    stats: Tensor,
    axes: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from visionattn.kernels import gated_positional_attention as kernels

    grads = kernels.backward(dout, q, k, v, position, gate, scale, content, stats, axes)
    return *grads, dout.new_empty(0) if bias is None else bias.new_zeros(bias.shape)


def _fake_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    scale: float,
    content: Tensor,
    stats: Tensor,
    axes: Tensor,
) -> tuple[Tensor, ...]:
    maps = (heads_last(x, x.shape) for x in (q, k, v))
    rest = (x.new_empty(x.shape) for x in (position, gate))
    return *maps, *rest, dout.new_empty(0) if bias is None else bias.new_empty(bias.shape)


_attend = differentiable(
    "gated_positional_attention_triton", _forward, _fake, _backward, fake_backward=_fake_backward, save=[1, 2, 3]
)
