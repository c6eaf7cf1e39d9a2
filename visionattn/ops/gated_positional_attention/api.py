"""Gated positional self-attention: a gated mean of attention by content and attention by relative position."""

from torch import Tensor

from visionattn.ops._check import check_maps
from visionattn.ops._dispatch import Impl, choose
from visionattn.ops.gated_positional_attention import eager, reference, triton

IMPLS = {"triton": triton, "eager": eager, "reference": reference}


def gated_positional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor,
    gate: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attend to all tokens of a map by content and by position (ConViT, arXiv:2103.10697, eq. 7).

    The weights of a query are ``(1 - gate) * softmax(scale * q . k) + gate * softmax(position . r)``, where ``r`` is
    ``(dx, dy, dx^2 + dy^2)`` from the query to the key, in tokens.

    Args:
        q: Queries ``(B, heads, H, W, d)``; fp16, bf16, fp32 or fp64.
        k: Keys, as ``q``.
        v: Values ``(B, heads, H, W, dv)``.
        position: Factors of ``r``, ``(heads, 3)``.
        gate: Share of attention by position, in [0, 1], ``(heads,)``: the sigmoid of ConViT's gating parameter.
        bias: Added to the positional logits, ``(heads,)``; it cancels in the softmax, and is here for weights that
            hold one.
        scale: Factor on the content logits; ``d ** -0.5`` if None.
        impl: ``"auto"`` takes the fastest implementation that accepts the input; a named one never falls back.

    Returns:
        ``(B, heads, H, W, dv)`` in the dtype of ``v``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        UnsupportedError: the named implementation cannot take this input; the message says why.
    """
    op = "gated_positional_attention"
    check_maps(op, q=q, k=k, v=v)
    heads = q.shape[1]
    for name, x, shape in (("position", position, (heads, 3)), ("gate", gate, (heads,)), ("bias", bias, (heads,))):
        if x is not None and x.shape != shape:
            raise ValueError(f"{op}: {name} must be {shape} for {heads} heads, got {tuple(x.shape)}")
    args = (q, k, v, position, gate, bias, q.shape[-1] ** -0.5 if scale is None else scale)
    return choose(op, impl, IMPLS, *args).forward(*args)
