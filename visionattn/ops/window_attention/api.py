"""Attention inside windows of a map: plain, shifted (Swin), stripes (CSwin) and dilated (MaxViT's grid)."""

import torch
from torch import Tensor

from visionattn.ops._check import check_maps
from visionattn.ops._dispatch import Impl, choose
from visionattn.ops.window_attention import eager, reference, triton

IMPLS = {"triton": triton, "eager": eager, "reference": reference}

Pair = int | tuple[int, int]


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: Pair,
    bias: Tensor | None = None,
    shift: Pair = 0,
    grid: bool = False,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Cut a map into windows of equal size and attend inside each: ``softmax(scale q k^T + bias) v``.

    - Windows are blocks of ``window`` neighbouring tokens (Swin, arXiv:2103.14030, eq. 4; stripes where one side is
      the map's: CSwin, arXiv:2107.00652).
    - With ``shift``, the windows are moved by that many tokens down and right. Those at the border hold tokens of
      opposite sides of the map, which do not attend to each other (Swin's cyclic shift and mask).
    - With ``grid``, a window holds ``window`` tokens spread evenly over the map, at strides ``H / window`` and
      ``W / window`` (MaxViT, arXiv:2204.01697, grid attention).

    Tokens of a window are numbered row by row, in the order of the map (for ``shift``: of the moved window).

    Args:
        q: Queries ``(B, heads, H, W, d)``; fp16, bf16, fp32 or fp64.
        k: Keys, as ``q``.
        v: Values ``(B, heads, H, W, dv)``.
        window: Tokens along each side of a window; they must divide ``H`` and ``W``.
        bias: Added to the logits of every window: ``(heads, n, n)``, query then key, with ``n`` the tokens of a window.
            It is cast to the dtype of ``q``.
        shift: Tokens by which windows are moved along each axis, less than the window's; none with ``grid``.
        grid: Spread windows instead of blocks.
        scale: Factor on the logits; ``d ** -0.5`` if None.
        impl: ``"auto"`` takes the fastest implementation that accepts the input; a named one never falls back.

    Returns:
        ``(B, heads, H, W, dv)`` in the dtype of ``v``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or windows do not divide the map.
        UnsupportedError: the named implementation cannot take this input; the message says why.
    """
    check_maps("window_attention", q=q, k=k, v=v)
    h, H, W, d = q.shape[1:]
    (wh, ww), (sh, sw) = _pair(window), _pair(shift)
    if wh < 1 or ww < 1 or H % wh or W % ww:
        raise ValueError(
            f"window_attention: window {(wh, ww)} must divide the map's {H} x {W} tokens; pad the map first"
        )
    if not (0 <= sh < wh and 0 <= sw < ww):
        raise ValueError(f"window_attention: shift {(sh, sw)} must be in [0, window) of window {(wh, ww)}")
    if grid and (sh or sw):
        raise ValueError(f"window_attention: grid windows cannot be shifted, got shift {(sh, sw)}")
    if bias is not None:
        n = wh * ww
        if bias.shape != (h, n, n) or bias.device != q.device or not bias.is_floating_point():
            raise ValueError(
                f"window_attention: bias must be floating (heads={h}, n={n}, n={n}) on {q.device} for window "
                f"{(wh, ww)}, got {tuple(bias.shape)} {bias.dtype} on {bias.device}"
            )
        bias = bias.to(q.dtype)
    args = (q, k, v, (wh, ww), bias, (sh, sw), grid, d**-0.5 if scale is None else scale)
    return choose("window_attention", impl, IMPLS, *args).forward(*args)


def _pair(x: Pair) -> tuple[int, int]:
    return (x, x) if isinstance(x, int | torch.SymInt) else (x[0], x[1])
