"""Triton: the pure form in blocks of scores, the linear form in one pass over queries and one over keys and values.

Like the other implementations, both keep the precision of their inputs under autocast.
"""

import torch
from torch import Tensor

from visionattn.kernels._layout import heads_last
from visionattn.ops._register import differentiable, why_not_triton


def why_not(q: Tensor, k: Tensor, v: Tensor, rho: Tensor, form: str, scale: float, eps: float) -> str | None:
    """CUDA tensors in half or single precision, up to 256 channels a head."""
    return why_not_triton(q, k, v)


def forward(q: Tensor, k: Tensor, v: Tensor, rho: Tensor, form: str, scale: float, eps: float) -> Tensor:
    """Attend without rho, which is multiplied by afterwards."""
    out = (_pure if form == "pure" else _linear)(q, k, v, scale, eps)
    return rho.to(v.dtype).reshape(-1, 1, 1) * out


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor]:
    from visionattn.kernels import infinite_attention as kernels

    return kernels.forward(q, k, v, scale, eps)


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor]:
    return heads_last(v, (*q.shape[:3], v.shape[3])), q.new_empty(q.shape[:2], dtype=torch.float32)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, out: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from visionattn.kernels import infinite_attention as kernels

    return kernels.backward(dout, q, k, v, scale, eps, out, norm)


def _forward_linear(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from visionattn.kernels import infinite_attention as kernels

    return kernels.forward_linear(q, k, v, scale, eps)


def _fake_linear(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, h, _, d = q.shape
    dv = v.shape[3]
    query, total, sums = (q.new_empty(B, h, size, dtype=torch.float32) for size in (d, 1, dv + 1))
    return heads_last(v, (B, h, 1, dv)), query, total, sums


def _backward_linear(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, query: Tensor, total: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from visionattn.kernels import infinite_attention as kernels

    return kernels.backward_linear(dout, q, k, v, scale, eps, query, total, sums)


def _fake_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, *saved: Tensor
) -> tuple[Tensor, ...]:
    return tuple(heads_last(x, x.shape) for x in (q, k, v))


_pure = differentiable(
    "infinite_attention_triton", _forward, _fake, _backward, fake_backward=_fake_backward, save=[0, 1]
)
_linear = differentiable(
    "infinite_attention_linear_triton",
    _forward_linear,
    _fake_linear,
    _backward_linear,
    fake_backward=_fake_backward,
    save=[1, 2, 3],
)
