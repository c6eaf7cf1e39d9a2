"""Output gates: what a head gathered, times the sigmoid of a logit."""

from torch import Tensor

from visionattn.ops._dispatch import Impl, choose
from visionattn.ops.sigmoid_gate import eager, reference, triton

IMPLS = {"triton": triton, "eager": eager, "reference": reference}


def sigmoid_gate(y: Tensor, logits: Tensor, *, scale: float = 1.0, impl: Impl = "auto") -> Tensor:
    """Multiply the heads of tokens by gates: ``y * sigmoid(logits) * scale`` (arXiv:2306.12929, eq. 5).

    Args:
        y: What attention gathered, ``(B, N, heads, d)``; fp16, bf16, fp32 or fp64.
        logits: Any floating tensor with four axes, each as long as that of ``y`` or 1: ``(B, N, heads, 1)`` for a gate
            a token and head, ``(B, 1, heads, 1)`` for one a head and image, ``(1, 1, heads, 1)`` for one a head,
            ``(B, N, heads, d)`` for one a channel (arXiv:2505.06708).
        scale: Factor on the gates.
        impl: ``"auto"`` takes the fastest implementation that accepts the input; a named one never falls back.

    Returns:
        ``(B, N, heads, d)`` in the dtype of ``y``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        UnsupportedError: the named implementation cannot take this input; the message says why.
    """
    fit = y.ndim == logits.ndim == 4
    if fit:  # in so many words, since a generator would take as long as small gates do
        (B, N, h, d), (b, n, g, c) = y.shape, logits.shape
        fit = (b == B or b == 1) and (n == N or n == 1) and (g == h or g == 1) and (c == d or c == 1)
    if not fit:
        raise ValueError(
            "sigmoid_gate: y must be (B, N, heads, d) and logits have four axes, each as long as that of y or 1; got "
            f"{tuple(y.shape)} and {tuple(logits.shape)}"
        )
    if not (y.is_floating_point() and logits.is_floating_point()) or y.device != logits.device:
        raise ValueError(
            "sigmoid_gate: y and logits must be floating point and on one device; got "
            f"{y.dtype} on {y.device} and {logits.dtype} on {logits.device}"
        )
    args = (y, logits, float(scale))
    return choose("sigmoid_gate", impl, IMPLS, *args).forward(*args)
