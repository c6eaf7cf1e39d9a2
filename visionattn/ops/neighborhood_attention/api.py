"""Neighbourhood attention: every token attends to the tokens around it."""

from torch import Tensor

from visionattn.ops._check import check_maps
from visionattn.ops._dispatch import Impl, choose
from visionattn.ops.neighborhood_attention import eager, natten, reference, triton

IMPLS = {"natten": natten, "triton": triton, "eager": eager, "reference": reference}


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attend from every token of a map to the ``kernel_size`` x ``kernel_size`` tokens around it.

    Along an axis of length L, the tokens whose index is equal modulo the dilation form a class; a token sees
    ``kernel_size`` consecutive tokens of its class, itself in the middle. At the ends the window is shifted inwards,
    not masked, so that every token sees as many keys; the classes need not be of equal size. The neighbourhood of a
    token of a map is the product of those of its row and its column (neighbourhood attention, arXiv:2204.07143; with
    dilation, arXiv:2209.15001).

    Args:
        q: Queries ``(B, heads, H, W, d)``; fp16, bf16, fp32 or fp64.
        k: Keys, as ``q``.
        v: Values ``(B, heads, H, W, dv)``.
        bias: Relative position bias ``(heads, 2 Kh - 1, 2 Kw - 1)`` or None, added to the scaled logits. It is read at
            key minus query, counted in tokens of the class, plus ``K - 1``, so it does not depend on the dilation; its
            middle is the token itself. Any floating dtype.
        kernel_size: Keys along each axis, or ``(Kh, Kw)``. An even one sees one token more before than behind.
        dilation: Distance between neighbours, or ``(dh, dw)``.
        scale: Factor on the logits; ``d ** -0.5`` if None.
        impl: ``"auto"`` takes the fastest implementation that accepts the input; a named one never falls back.
            ``"natten"`` needs a GPU and no bias.

    Returns:
        ``(B, heads, H, W, dv)`` in the dtype of ``v``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the map is smaller than ``kernel_size * dilation``.
        UnsupportedError: the named implementation cannot take this input; the message says why.
    """
    op = "neighborhood_attention"
    check_maps(op, q=q, k=k, v=v)
    kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else (kernel_size[0], kernel_size[1])
    spread = (dilation, dilation) if isinstance(dilation, int) else (dilation[0], dilation[1])
    if min(kernel) < 1 or min(spread) < 1:
        raise ValueError(f"{op}: kernel_size and dilation must be at least 1, got {kernel_size} and {dilation}")
    size = tuple(q.shape[2:4])
    if any(n < K * d for n, K, d in zip(size, kernel, spread, strict=True)):
        raise ValueError(
            f"{op}: a map of {size} is smaller than kernel_size {kernel} x dilation {spread}; pad the map first"
        )
    if bias is not None:
        table = (q.shape[1], 2 * kernel[0] - 1, 2 * kernel[1] - 1)
        if bias.shape != table:
            raise ValueError(
                f"{op}: bias must be (heads, 2 Kh - 1, 2 Kw - 1) = {table} for kernel_size {kernel}, "
                f"got {tuple(bias.shape)}"
            )
        if bias.device != q.device or not bias.is_floating_point():
            raise ValueError(f"{op}: bias must be floating point on {q.device} as q, got {bias.dtype} on {bias.device}")
    args = (q, k, v, bias, kernel, spread, q.shape[-1] ** -0.5 if scale is None else scale)
    return choose(op, impl, IMPLS, *args).forward(*args)
