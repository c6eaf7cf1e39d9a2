"""Aggregated attention: every token attends to the window around it and to pooled tokens, in one softmax."""

import math

from torch import Tensor

from visionattn.ops._check import check_maps, check_tokens
from visionattn.ops._dispatch import Impl, choose
from visionattn.ops.aggregated_attention import eager, reference, triton

IMPLS = {"triton": triton, "eager": eager, "reference": reference}


def aggregated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Attend to a window and to pooled tokens with one softmax over both (TransNeXt, arXiv:2311.17132, eq. 3 to 7).

    For the token at ``(y, x)`` of a head, with ``w`` over the cells of the window around it and ``p`` over pooled
    tokens:

        attn = softmax([q . k[w] + bias_local[w] | q . k_pool[p] + bias_pool[p]])
        out = sum_w (attn[w] + extra[w]) * v[w] + sum_p attn[p] * v_pool[p]

    Cells outside the map take no part: their logit is -inf, and ``extra`` has no effect there.

    Args:
        q: Queries ``(B, heads, H, W, d)``, with every scale applied (temperature, length); fp16, bf16, fp32 or fp64.
        k: Keys, as ``q``.
        v: Values ``(B, heads, H, W, dv)``.
        k_pool: Pooled keys ``(B, heads, P, d)``, ``P`` at least 1.
        v_pool: Pooled values ``(B, heads, P, dv)``.
        bias_local: Bias of each cell of the window, ``(heads, window ** 2)``, row by row. It says how large the window
            is: odd, 3 in the paper.
        bias_pool: Bias of each pair of token and pooled token, ``(heads, H * W, P)``.
        extra: Weights that are added to the window's after the softmax, ``(B, heads, H, W, window ** 2)``; any real
            number. In the paper, the query's products with learnable tokens. None adds nothing.
        impl: ``"auto"`` takes the fastest implementation that accepts the input; a named one never falls back.

    Returns:
        ``(B, heads, H, W, dv)`` in the dtype of ``v``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        UnsupportedError: the named implementation cannot take this input; the message says why.
    """
    op = "aggregated_attention"
    check_maps(op, q=q, k=k, v=v)
    B, heads, H, W, d = q.shape
    check_tokens(op, k_pool=k_pool, v_pool=v_pool)
    P = k_pool.shape[2]
    if k_pool.shape != (B, heads, P, d) or v_pool.shape != (B, heads, P, v.shape[-1]) or P < 1:
        raise ValueError(
            f"{op}: k_pool and v_pool must be (B={B}, heads={heads}, P >= 1, d={d} or dv={v.shape[-1]}), "
            f"got {tuple(k_pool.shape)} and {tuple(v_pool.shape)}"
        )
    cells = bias_local.shape[-1]
    window = math.isqrt(cells)
    if bias_local.shape != (heads, cells) or window**2 != cells or window % 2 == 0:
        raise ValueError(
            f"{op}: bias_local must be (heads={heads}, window ** 2) for an odd window, got {tuple(bias_local.shape)}"
        )
    if bias_pool.shape != (heads, H * W, P):
        raise ValueError(f"{op}: bias_pool must be (heads={heads}, H * W={H * W}, P={P}), got {tuple(bias_pool.shape)}")
    if extra is not None and extra.shape != (B, heads, H, W, cells):
        raise ValueError(f"{op}: extra must be {(B, heads, H, W, cells)}, got {tuple(extra.shape)}")
    named = (("k_pool", k_pool), ("bias_local", bias_local), ("bias_pool", bias_pool), ("extra", extra))
    for name, x in named:
        if x is not None and (x.dtype != q.dtype or x.device != q.device):
            raise ValueError(f"{op}: {name} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}; they must agree")
    args = (q, k, v, k_pool, v_pool, bias_local, bias_pool, extra)
    return choose(op, impl, IMPLS, *args).forward(*args)
