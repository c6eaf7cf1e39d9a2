"""Triton: one pass over the tokens each way; gates exist in registers alone."""

from torch import Tensor

from visionattn.ops._register import differentiable, why_not_triton

WIDEST = 4096  # channels of a head: a program holds whole rows


def why_not(y: Tensor, logits: Tensor, scale: float) -> str | None:
    """CUDA tensors in half or single precision, up to 4096 channels a head."""
    return why_not_triton(y, logits, widest=WIDEST)


def forward(y: Tensor, logits: Tensor, scale: float) -> Tensor:
    """Gate in blocks of rows."""
    return _gate(y, logits, scale)


def _forward(y: Tensor, logits: Tensor, scale: float) -> Tensor:
    from visionattn.kernels import sigmoid_gate as kernels

    return kernels.forward(y, logits, scale)


def _fake(y: Tensor, logits: Tensor, scale: float) -> Tensor:
    return y.new_empty(y.shape)


def _backward(dout: Tensor, y: Tensor, logits: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from visionattn.kernels import sigmoid_gate as kernels

    return kernels.backward(dout, y, logits, scale)


_gate = differentiable("sigmoid_gate_triton", _forward, _fake, _backward)
