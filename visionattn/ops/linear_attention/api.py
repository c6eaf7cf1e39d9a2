"""Linear attention: a key-value state instead of the N x N matrix, under three normalisations."""

from typing import Literal, get_args

from torch import Tensor

from visionattn.ops._check import check_tokens
from visionattn.ops._dispatch import Impl, choose
from visionattn.ops.linear_attention import eager, reference, triton

IMPLS = {"triton": triton, "eager": eager, "reference": reference}

Normalization = Literal["sum", "magnitude_aware", "injective"]
NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    normalization: Normalization = "sum",
    rope: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    impl: Impl = "auto",
) -> Tensor:
    """Attend through a state of fixed size, ``sum_j k_j^T v_j``: time and memory are linear in the tokens.

    With ``n`` keys, ``s`` the scale, ``q^, k^`` the rotated queries and keys (the given ones without ``rope``):

    - ``"sum"``: ``o_i = sum_j (q^_i . k^_j) v_j / (q_i . sum_j k_j + eps)`` (Katharopoulos et al., arXiv:2006.16236,
      eq. 5; with the rotation left out of the divisor, Su et al., arXiv:2104.09864, eq. 19). ``s`` cancels out.
    - ``"magnitude_aware"``: ``o_i = (1 + 1 / (z_i + eps)) (s / n) sum_j (q^_i . k^_j) v_j - z_i mean_j v_j`` with
      ``z_i = s q_i . mean_j k_j`` (MALA, arXiv:2507.00698): attention that grows sharper with the norm of the query.
    - ``"injective"``: ``o_i = mean_j v_j + (s / n) sum_j (q_i . (k_j - mean_t k_t)) v_j`` (InLine, arXiv:2412.06590,
      eq. 5): the row mean of the logits is subtracted instead of a division. It takes no ``rope``.

    Without ``rope`` the implied weights of a query sum to one (up to ``eps``). Sums run in fp32 (fp64 for fp64)
    whatever the dtype, under autocast as well, and the result is rounded once.

    Args:
        q: Queries ``(B, heads, N, d)``; fp16, bf16, fp32 or fp64. Feature maps are the caller's: ``"sum"`` and
            ``"magnitude_aware"`` need positive features, such as ``elu(x) + 1``; ``"injective"`` takes any.
        k: Keys ``(B, heads, M, d)``.
        v: Values ``(B, heads, M, dv)``.
        normalization: See above.
        rope: Cosines and sines ``(N, d / 2)`` that rotate the pairs of neighbouring channels ``(0, 1), (2, 3), ...`` of
            queries and keys in the sums over values, and not in the normalisers; ``M`` must then be ``N``.
        scale: ``s``; ``d ** -0.5`` if None.
        eps: Added to the divisor.
        impl: ``"auto"`` takes the fastest implementation that accepts the input; a named one never falls back.

    Returns:
        ``(B, heads, N, dv)`` in the dtype of ``v``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the normalisation is unknown.
        UnsupportedError: the named implementation cannot take this input; the message says why.
    """
    check_tokens("linear_attention", q=q, k=k, v=v)
    N, d = q.shape[2:]
    if normalization not in NORMALIZATIONS:
        raise ValueError(
            f"linear_attention: normalization must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}"
        )
    if rope is not None:
        if normalization == "injective":
            raise ValueError("linear_attention: normalization='injective' takes no rope")
        if k.shape[2] != N:
            raise ValueError(f"linear_attention: rope needs as many keys as queries, got {k.shape[2]} and {N}")
        if d % 2 or any(x.shape != (N, d // 2) for x in rope):
            raise ValueError(
                f"linear_attention: rope must be two tensors (N, d / 2) for q {tuple(q.shape)}, "
                f"got {' and '.join(str(tuple(x.shape)) for x in rope)}"
            )
    args = (q, k, v, normalization, rope, d**-0.5 if scale is None else scale, eps)
    return choose("linear_attention", impl, IMPLS, *args).forward(*args)
