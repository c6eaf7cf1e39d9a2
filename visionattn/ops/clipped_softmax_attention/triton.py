"""Triton: two passes over the keys, and nothing but one number a query kept for the backward pass."""

import torch
from torch import Tensor

from visionattn.kernels._layout import heads_last
from visionattn.ops._register import autocast, differentiable, why_not_triton


def why_not(q: Tensor, k: Tensor, v: Tensor, gamma: float, zeta: float, scale: float) -> str | None:
    """CUDA tensors in half or single precision, up to 256 channels a head, at least one key."""
    return why_not_triton(q, k, v) or (None if k.shape[2] else "there are no keys")


def forward(q: Tensor, k: Tensor, v: Tensor, gamma: float, zeta: float, scale: float) -> Tensor:
    """Attend in blocks."""
    return _attend(*autocast(q, k, v), gamma, zeta, scale)


def _forward(q: Tensor, k: Tensor, v: Tensor, gamma: float, zeta: float, scale: float) -> tuple[Tensor, Tensor]:
    from visionattn.kernels import clipped_softmax_attention as kernels

    return kernels.forward(q, k, v, gamma, zeta, scale)


def _fake(q: Tensor, k: Tensor, v: Tensor, gamma: float, zeta: float, scale: float) -> tuple[Tensor, Tensor]:
    return heads_last(v, (*q.shape[:3], v.shape[3])), q.new_empty(*q.shape[:3], 2, dtype=torch.float32)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, gamma: float, zeta: float, scale: float, stats: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from visionattn.kernels import clipped_softmax_attention as kernels

    return kernels.backward(dout, q, k, v, gamma, zeta, scale, stats)


def _fake_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, gamma: float, zeta: float, scale: float, stats: Tensor
) -> tuple[Tensor, ...]:
    return tuple(heads_last(x, x.shape) for x in (q, k, v))


_attend = differentiable(
    "clipped_softmax_attention_triton", _forward, _fake, _backward, fake_backward=_fake_backward, save=[1]
)
