"""Triton: one pass over keys and values, one over queries; the backward pass as many. The state is all that is kept."""

import torch
from torch import Tensor

from visionattn.kernels._layout import heads_last
from visionattn.ops._register import differentiable, why_not_triton


def why_not(
    q: Tensor, k: Tensor, v: Tensor, normalization: str, rope: tuple[Tensor, Tensor] | None, scale: float, eps: float
) -> str | None:
    """CUDA tensors in half or single precision, up to 256 channels a head, at least one key, fixed tables."""
    why = why_not_triton(q, k, v) or (None if k.shape[2] else "there are no keys")
    if why is None and rope is not None and torch.is_grad_enabled() and any(x.requires_grad for x in rope):
        return "its backward pass has no gradients of rope's tables"
    return why


def forward(
    q: Tensor, k: Tensor, v: Tensor, normalization: str, rope: tuple[Tensor, Tensor] | None, scale: float, eps: float
) -> Tensor:
    """Sum the state, multiply and normalise; in fp32 under autocast too."""
    cos, sin = (None, None) if rope is None else rope
    return _attend(q, k, v, normalization, cos, sin, scale, eps)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    normalization: str,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    from visionattn.kernels import linear_attention as kernels

    return kernels.forward(q, k, v, normalization, cos, sin, scale, eps)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    normalization: str,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    B, h, N, d = q.shape
    dv = v.shape[3]
    return heads_last(v, (B, h, N, dv)), v.new_empty(B, h, d * dv + d + dv, dtype=torch.float32)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    normalization: str,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    eps: float,
    sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from visionattn.kernels import linear_attention as kernels

    none = dout.new_empty(0)
    return *kernels.backward(dout, q, k, v, normalization, cos, sin, scale, eps, sums), none, torch.empty_like(none)


def _fake_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    normalization: str,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    eps: float,
    sums: Tensor,
) -> tuple[Tensor, ...]:
    return *(heads_last(x, x.shape) for x in (q, k, v)), dout.new_empty(0), dout.new_empty(0)


_attend = differentiable("linear_attention_triton", _forward, _fake, _backward, fake_backward=_fake_backward, save=[1])
