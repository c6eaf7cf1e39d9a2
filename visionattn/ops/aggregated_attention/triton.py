"""Triton: the window's cells and blocks of pooled tokens in one online softmax."""

import torch
from torch import Tensor

from visionattn.kernels._layout import heads_last
from visionattn.ops._register import autocast, differentiable, why_not_triton

MOST_CELLS = 49  # a program keeps the weights of all cells of its tokens


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
) -> str | None:
    """CUDA tensors in half or single precision, up to 256 channels a head, a window of up to 7 x 7."""
    cells = bias_local.shape[1]
    too_large = (
        f"Triton's kernel takes windows of up to {MOST_CELLS} cells, got {cells}" if cells > MOST_CELLS else None
    )
    return why_not_triton(q, k, v) or too_large


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
) -> Tensor:
    """Attend block by block."""
    tensors = autocast(q, k, v, k_pool, v_pool, bias_local, bias_pool)
    out: Tensor = _attend(*tensors, None if extra is None else autocast(extra)[0])
    return out


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
    from visionattn.kernels import aggregated_attention as kernels

    return kernels.forward(q, k, v, k_pool, v_pool, bias_local, bias_pool, extra)


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
    return heads_last(v, v.shape), q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3], dtype=torch.float32)


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
    tops: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from visionattn.kernels import aggregated_attention as kernels

    return kernels.backward(dout, q, k, v, k_pool, v_pool, bias_local, bias_pool, extra, tops)


def _fake_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
    tops: Tensor,
) -> tuple[Tensor, ...]:
    return (
        *(heads_last(x, x.shape) for x in (q, k, v)),
        *(x.new_empty(x.shape) for x in (k_pool, v_pool, bias_local, bias_pool)),
        q.new_empty(0) if extra is None else heads_last(extra, extra.shape),
    )


_attend = differentiable(
    "aggregated_attention_triton", _forward, _fake, _backward, fake_backward=_fake_backward, save=[1]
)
