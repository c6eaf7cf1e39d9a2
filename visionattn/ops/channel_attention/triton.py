"""Triton: logits summed over the tokens where they lie, and one d x d matrix a group kept for the backward pass."""

import torch
from torch import Tensor

from visionattn.kernels._layout import heads_last
from visionattn.ops._register import autocast, differentiable, why_not_triton

WIDEST = 64  # channels of a group: a d x d matrix stays in registers


def why_not(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """CUDA tensors in half or single precision, up to 64 channels a group."""
    return why_not_triton(q, k, v, widest=WIDEST)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend in blocks of tokens."""
    return _attend(*autocast(q, k, v), scale)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from visionattn.kernels import channel_attention as kernels

    return kernels.forward(q, k, v, scale)


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    B, g, _, d = q.shape
    return heads_last(v, v.shape), q.new_empty(B, g, d, d, dtype=torch.float32)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from visionattn.kernels import channel_attention as kernels

    return kernels.backward(dout, q, k, v, scale, weights)


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, weights: Tensor) -> tuple[Tensor, ...]:
    return tuple(heads_last(x, x.shape) for x in (q, k, v))


_attend = differentiable("channel_attention_triton", _forward, _fake, _backward, fake_backward=_fake_backward, save=[1])
