"""Infinite self-attention: scores that are normalised as a whole instead of row by row, or pooled by one query."""

from typing import Literal

from torch import Tensor

from visionattn.ops._check import check_tokens
from visionattn.ops._dispatch import Impl, choose
from visionattn.ops.infinite_attention import eager, reference, triton

IMPLS = {"triton": triton, "eager": eager, "reference": reference}

Form = Literal["pure", "linear"]


def infinite_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: Tensor,
    *,
    form: Form = "pure",
    scale: float | None = None,
    eps: float = 1e-6,
    impl: Impl = "auto",
) -> Tensor:
    """Attend with rectified scores and one normaliser a head (InfSA, arXiv:2603.00175).

    With ``S = relu(scale * q k^T)``, the pure form returns ``rho * S v / (||S||_F + eps)``; the Frobenius norm is over
    all queries and keys of a head, so rows are not normalised one by one.

    The linear form keeps a state of fixed size, independent of the number of tokens: the mean query, weighted by the
    queries' own norms, ``w_n = ||q_n|| / (sum ||q|| + eps)``. It scores the keys, ``a = relu(scale * q_mean k^T)``,
    and all queries receive the same ``rho * a v / (sum a + eps)``, which is returned once.

    Args:
        q: Queries ``(B, heads, N, d)``; fp16, bf16, fp32 or fp64.
        k: Keys ``(B, heads, S, d)``.
        v: Values ``(B, heads, S, dv)``.
        rho: Discount, a scalar or one number a head ``(heads,)``; differentiable.
        form: ``"pure"`` or ``"linear"``.
        scale: Factor on the scores, positive; ``1 / d`` if None, since the authors scale queries and keys by
            ``d ** -0.5`` each. It matters only against ``eps``.
        eps: Added to the normalisers (with ``sqrt(scale)`` applied to the queries before, as the authors do). Norms
            and sums are taken in fp32 at least.
        impl: ``"auto"`` takes the fastest implementation that accepts the input; a named one never falls back.

    Returns:
        ``(B, heads, N, dv)`` in the dtype of ``v``; ``(B, heads, 1, dv)`` from the linear form.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, ``form`` is unknown or ``scale`` not positive.
        UnsupportedError: the named implementation cannot take this input; the message says why.
    """
    check_tokens("infinite_attention", q=q, k=k, v=v)
    if form not in ("pure", "linear"):
        raise ValueError(f"infinite_attention: form must be 'pure' or 'linear', got {form!r}")
    if rho.shape not in ((), (q.shape[1],)):
        raise ValueError(
            f"infinite_attention: rho must be a scalar or ({q.shape[1]},), one a head; got shape {tuple(rho.shape)}"
        )
    scale = 1 / q.shape[-1] if scale is None else scale
    if scale <= 0:
        raise ValueError(f"infinite_attention: scale must be positive, got {scale}")
    args = (q, k, v, rho, form, scale, eps)
    return choose("infinite_attention", impl, IMPLS, *args).forward(*args)
