"""Channel attention: channels attend to channels, with all tokens as their features."""

from torch import Tensor

from visionattn.ops._check import check_tokens
from visionattn.ops._dispatch import Impl, choose
from visionattn.ops.channel_attention import eager, reference, triton

IMPLS = {"triton": triton, "eager": eager, "reference": reference}


def channel_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, impl: Impl = "auto") -> Tensor:
    """Attend among the channels of each group: linear in tokens, quadratic in the channels of a group.

    Channel ``i`` of the output is the mean of the channels of ``v``, weighted by ``softmax_j(scale * q_i . k_j)`` where
    ``q_i`` and ``k_j`` are the values of a channel at all tokens (DaViT, arXiv:2204.03645, eq. 4).

    Args:
        q: ``(B, groups, N, d)``; fp16, bf16, fp32 or fp64.
        k: As ``q``.
        v: As ``q``.
        scale: Factor on the logits; ``d ** -0.5`` if None, as in DaViT. Florence-2 uses ``N ** -0.5``.
        impl: ``"auto"`` takes the fastest implementation that accepts the input; a named one never falls back.

    Returns:
        ``(B, groups, N, d)`` in the dtype of ``v``; the softmax is computed in float32 at least.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        UnsupportedError: the named implementation cannot take this input; the message says why.
    """
    check_tokens("channel_attention", q=q, k=k, v=v)
    if not q.shape == k.shape == v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"channel_attention: q, k and v must have one shape, got {shapes}")
    args = (q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
    return choose("channel_attention", impl, IMPLS, *args).forward(*args)
