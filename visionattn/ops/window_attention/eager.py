"""Fast plain PyTorch: one copy into windows and one out, and one attention over all windows at once.

Shifted windows need neither roll nor mask on large maps: what the mask leaves of a window at the border is a smaller
window, so the map falls into zones of at most three window sizes along each axis, and each zone is attended on its own.
On small maps a few calls cost more than a few bytes: there all windows are attended at once, rolled and masked.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from visionattn.ops._crossovers import first_wins
from visionattn.ops._dispatch import exporting

Size = tuple[int, int]
Zone = tuple[int, int, int]

MASK_WINS = "window_attention: elements of the queries, shifted; all windows masked, zones"
PRODUCTS_WIN = "window_attention: tokens of a window; two products, fused attention"


def why_not(
    q: Tensor, k: Tensor, v: Tensor, window: Size, bias: Tensor | None, shift: Size, grid: bool, scale: float
) -> str | None:
    """Everything runs, but up to nine attentions for one make large files, which take minutes to write."""
    return "shifted windows are exported as one attention, not as zones" if exporting() and shift != (0, 0) else None


def forward(
    q: Tensor, k: Tensor, v: Tensor, window: Size, bias: Tensor | None, shift: Size, grid: bool, scale: float
) -> Tensor:
    """Attend in every window."""
    if shift == (0, 0):
        return _attend(q, k, v, window, bias, grid, scale)
    if first_wins(MASK_WINS, q.numel(), q) and first_wins(PRODUCTS_WIN, window[0] * window[1], q):
        q, k, v = (x.roll((-shift[0], -shift[1]), dims=(2, 3)) for x in (q, k, v))
        return _attend(q, k, v, window, bias, grid, scale, shift)
    row_zones, col_zones = (_zones(q.shape[2 + i], window[i], shift[i]) for i in range(2))
    rows = []
    for (_, top, wh), *row in zip(row_zones, *(_split(x, row_zones, dim=2) for x in (q, k, v)), strict=True):
        parts = []
        for (_, left, ww), *zone in zip(col_zones, *(_split(x, col_zones, dim=3) for x in row), strict=True):
            part = bias
            if bias is not None and (wh, ww) != window:
                part = bias.unflatten(2, window).unflatten(1, window)  # (h, wh, ww, wh, ww)
                r, c = slice(top, top + wh), slice(left, left + ww)
                part = part[:, r, c, r, c].flatten(3, 4).flatten(1, 2)
            parts.append(_attend(zone[0], zone[1], zone[2], (wh, ww), part, grid, scale))
        rows.append(torch.cat(parts, dim=3))
    return torch.cat(rows, dim=2)


def _zones(size: int, window: int, shift: int) -> list[Zone]:
    """Cut an axis into zones of equal windows: length, first token of the full window that is kept, tokens kept."""
    zones = [(shift, window - shift, shift), (size - window, 0, window), (window - shift, 0, window - shift)]
    return [zone for zone in zones if zone[0]] if shift else [(size, 0, window)]


def _split(x: Tensor, zones: list[Zone], dim: int) -> tuple[Tensor, ...]:
    return x.split([zone[0] for zone in zones], dim=dim)  # unlike slices, one concatenation in the backward pass


def _mask(windows: Size, window: Size, shift: Size, like: Tensor) -> Tensor:
    """``-inf`` between tokens that a roll brought together from opposite sides: ``(P, 1, n, n)``."""
    tokens = like.new_zeros(*windows, *window, *window)
    for axis, (side, by) in enumerate(zip(window, shift, strict=True)):
        if by:  # the last windows hold both sides
            last, query, key = tokens.select(axis, -1), 1 + axis, 3 + axis
            last.narrow(query, 0, side - by).narrow(key, side - by, by).fill_(-math.inf)
            last.narrow(query, side - by, by).narrow(key, 0, side - by).fill_(-math.inf)
    return tokens.view(windows[0] * windows[1], 1, window[0] * window[1], -1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, window: Size, bias: Tensor | None, grid: bool, scale: float,
    shift: Size = (0, 0),
) -> Tensor:  # fmt: skip
    """Attend in every window; with ``shift``, the maps have been rolled by it, and the result is rolled back."""
    B, h, H, W, _ = q.shape
    wh, ww = window
    shifted = shift != (0, 0)
    if window == (H, W) and bias is None and not shifted:  # nothing is cut: fused attention needs no copies
        q, k, v = (x.flatten(2, 3) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).unflatten(2, window)
    count, n = (H // wh) * (W // ww), wh * ww
    # Split an axis into (count, window) or, in a grid, (window, count), and bring the counts to the front.
    split = (wh, H // wh, ww, W // ww) if grid else (H // wh, wh, W // ww, ww)
    to_windows = (0, 3, 5, 1, 2, 4, 6) if grid else (0, 2, 4, 1, 3, 5, 6)
    to_map = (0, 4, 1, 5, 2, 3, 6) if grid else (0, 1, 4, 2, 5, 3, 6)
    products = shifted or first_wins(PRODUCTS_WIN, n, q)
    rows = (B * count * h, n) if products else (B * count, h, n)
    q, k, v = (x.view(B, h, *split, x.shape[-1]).permute(to_windows).reshape(*rows, x.shape[-1]) for x in (q, k, v))
    if not products:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    elif bias is None and not shifted:
        logits = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)  # scaled in passing
        out = torch.bmm(logits.softmax(dim=-1), v)
    else:  # the product is added to what would be added to it
        mask = _mask((H // wh, W // ww), window, shift, q) if shifted else q.new_zeros(count, 1, 1, 1)
        added = mask.expand(B, *mask.shape) + (q.new_zeros(h, 1, 1) if bias is None else bias)
        # No view, since autograd copies the gradients of one that is written to.
        logits = torch.ops.aten._unsafe_view(added, (-1, n, n)).baddbmm_(q, k.transpose(1, 2), alpha=scale)
        out = torch.bmm(logits.softmax(dim=-1), v)
    out = out.view(B, H // wh, W // ww, h, wh, ww, v.shape[-1]).permute(to_map)  # (B, H, W, h, dv), each axis in two
    out = out.reshape(B, H, W, h, v.shape[-1])
    return (out.roll(shift, dims=(1, 2)) if shifted else out).permute(0, 3, 1, 2, 4)
