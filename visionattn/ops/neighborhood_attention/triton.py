"""Triton: tiles of queries against the rectangle of keys that they reach, with dilation and relative bias."""

import torch
from torch import Tensor

from visionattn.kernels._layout import heads_last
from visionattn.ops._register import autocast, differentiable, why_not_triton
from visionattn.ops.neighborhood_attention._windows import Pair


def why_not(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel_size: Pair, dilation: Pair, scale: float
) -> str | None:
    """CUDA tensors in half or single precision, up to 256 channels a head; the bias may be of any floating dtype."""
    return why_not_triton(q, k, v)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel_size: Pair, dilation: Pair, scale: float
) -> Tensor:
    """Attend tile by tile."""
    out: Tensor = _attend(*autocast(q, k, v), bias, kernel_size, dilation, scale)
    return out


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel_size: list[int], dilation: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    from visionattn.kernels import neighborhood_attention as kernels

    return kernels.forward(q, k, v, bias, _pair(kernel_size), _pair(dilation), scale)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel_size: list[int], dilation: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    return _map_like(v), q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3], 2, dtype=torch.float32)


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    dilation: list[int],
    scale: float,
    out: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from visionattn.kernels import neighborhood_attention as kernels

    return kernels.backward(dout, q, k, v, bias, _pair(kernel_size), _pair(dilation), scale, out, stats)


def _fake_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    dilation: list[int],
    scale: float,
    out: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dbias = q.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return _map_like(q), _map_like(k), _map_like(v), dbias


def _pair(numbers: list[int]) -> Pair:
    return numbers[0], numbers[1]


def _map_like(x: Tensor) -> Tensor:
    return heads_last(x, x.shape)


_attend = differentiable(
    "neighborhood_attention_triton", _forward, _fake, _backward, fake_backward=_fake_backward, save=[0, 1]
)
