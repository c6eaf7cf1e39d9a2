"""Attention whose probabilities are stretched and clipped, so that a head can attend to nothing."""

from torch import Tensor

from visionattn.ops._check import check_tokens
from visionattn.ops._dispatch import Impl, choose
from visionattn.ops.clipped_softmax_attention import eager, reference, triton

IMPLS = {"triton": triton, "eager": eager, "reference": reference}


def clipped_softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, gamma: float, zeta: float = 1.0, scale: float | None = None, impl: Impl = "auto"
) -> Tensor:
    """Attend with ``clip((zeta - gamma) * softmax(scale * q k^T) + gamma, 0, 1)`` (arXiv:2306.12929, eq. 4).

    With ``gamma < 0``, probabilities up to ``-gamma / (zeta - gamma)`` become exactly zero; with ``zeta > 1``, those
    from ``(1 - gamma) / (zeta - gamma)`` exactly one. No gradient flows where they are clipped, and the rows no longer
    sum to one. With ``gamma = 0`` and ``zeta = 1``, this is plain attention.

    Args:
        q: Queries ``(B, heads, N, d)``; fp16, bf16, fp32 or fp64.
        k: Keys ``(B, heads, S, d)``.
        v: Values ``(B, heads, S, dv)``.
        gamma: Lower end of the stretched interval, at most 0.
        zeta: Upper end of the stretched interval, at least 1.
        scale: Factor on the logits; ``d ** -0.5`` if None.
        impl: ``"auto"`` takes the fastest implementation that accepts the input; a named one never falls back.

    Returns:
        ``(B, heads, N, dv)`` in the dtype of ``v``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, ``gamma > 0`` or ``zeta < 1``.
        UnsupportedError: the named implementation cannot take this input; the message says why.
    """
    check_tokens("clipped_softmax_attention", q=q, k=k, v=v)
    check_interval("clipped_softmax_attention", gamma, zeta)
    args = (q, k, v, float(gamma), float(zeta), q.shape[-1] ** -0.5 if scale is None else scale)
    return choose("clipped_softmax_attention", impl, IMPLS, *args).forward(*args)


def check_interval(op: str, gamma: float, zeta: float) -> None:
    """Raise ValueError unless ``gamma <= 0`` and ``zeta >= 1``."""
    if not (gamma <= 0 and zeta >= 1):
        raise ValueError(f"{op}: gamma must be at most 0 and zeta at least 1, got {gamma} and {zeta}")
