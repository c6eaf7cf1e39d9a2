"""The definition: roll, cut, mask, softmax, and back."""

import math

import torch
from torch import Tensor

Size = tuple[int, int]


def why_not(
    q: Tensor, k: Tensor, v: Tensor, window: Size, bias: Tensor | None, shift: Size, grid: bool, scale: float
) -> str | None:
    """The reference takes everything."""
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, window: Size, bias: Tensor | None, shift: Size, grid: bool, scale: float
) -> Tensor:
    """Attend in every window by the written-out softmax."""
    size = (q.shape[2], q.shape[3])
    if shift != (0, 0):
        q, k, v = (_roll(x, shift) for x in (q, k, v))
    q, k, v = (_cut(x, window, grid) for x in (q, k, v))  # (B, h, P, n, d)
    logits = (q * scale) @ k.transpose(-2, -1)  # (B, h, P, n, n)
    if bias is not None:
        logits = logits + bias[:, None]
    if shift != (0, 0):
        logits = logits + _mask(size, window, shift, logits)
    out = _join(logits.softmax(dim=-1) @ v, size, window, grid)
    return _roll(out, (size[0] - shift[0], size[1] - shift[1])) if shift != (0, 0) else out


def _roll(x: Tensor, shift: Size) -> Tensor:
    """Bring the first rows and columns of ``(B, h, H, W, d)`` to the end; how many, exporters may leave open."""
    for dim, by in enumerate(shift, start=2):
        x = torch.cat([x.narrow(dim, by, x.shape[dim] - by), x.narrow(dim, 0, by)], dim=dim)
    return x


def _cut(x: Tensor, window: Size, grid: bool) -> Tensor:
    """Cut ``(B, h, H, W, d)`` into row-major windows of row-major tokens: ``(B, h, P, n, d)``."""
    H, W = x.shape[2:4]
    wh, ww = window
    if grid:
        x = x.unflatten(3, (ww, W // ww)).unflatten(2, (wh, H // wh)).permute(0, 1, 3, 5, 2, 4, 6)
    else:
        x = x.unflatten(3, (W // ww, ww)).unflatten(2, (H // wh, wh)).transpose(3, 4)
    return x.flatten(4, 5).flatten(2, 3)


def _join(x: Tensor, size: Size, window: Size, grid: bool) -> Tensor:
    """Undo `_cut`."""
    (H, W), (wh, ww) = size, window
    x = x.unflatten(3, (wh, ww)).unflatten(2, (H // wh, W // ww))  # (B, h, gh, gw, wh, ww, d)
    x = x.permute(0, 1, 4, 2, 5, 3, 6) if grid else x.transpose(3, 4)
    return x.flatten(4, 5).flatten(2, 3)


def _mask(size: Size, window: Size, shift: Size, like: Tensor) -> Tensor:
    """``-inf`` between the tokens of a rolled window that come from opposite sides of the map: ``(P, n, n)``."""
    (H, W), (sh, sw) = size, shift
    side = torch.zeros(1, 1, H, W, 1, device=like.device)
    if sh:
        side[:, :, H - sh :] += 1
    if sw:
        side[:, :, :, W - sw :] += 2
    side = _cut(side, window, grid=False)[0, 0]  # (P, n, 1)
    zero = torch.zeros((), dtype=like.dtype, device=like.device)
    return zero.masked_fill(side != side.transpose(-2, -1), -math.inf)
