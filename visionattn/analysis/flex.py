"""FlexAttention's version of the operators that it can express, as contestants on a GPU.

It attends among all tokens of a map under a mask, and skips the blocks of 128 x 128 tokens that the mask empties.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from visionattn.analysis.bench import Run
from visionattn.ops.neighborhood_attention._windows import neighborhood

Mod = Callable[..., Tensor]


def window(size: tuple[int, int], side: int, shift: int, *, biased: bool) -> Run:
    """Windows of ``side`` x ``side``, shifted or not: `visionattn.ops.window_attention`."""
    (rows, row_zone), (cols, col_zone) = (_window_axis(length, side, shift) for length in size)
    number = (row_zone[:, None] * 2 * size[1] + col_zone).flatten()  # (N,): tokens that see each other
    place = (rows[:, None] % side * side + cols % side).flatten()  # (N,): within its window

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return number[i] == number[j]

    def score(bias: Tensor) -> Mod:
        return lambda s, b, h, i, j: s + bias[h, place[i], place[j]]

    return _attend(mask, score if biased else None)


def _window_axis(length: int, side: int, shift: int) -> tuple[Tensor, Tensor]:
    """Positions after the shift, and which of the zones that a mask keeps apart each token lies in."""
    at = torch.arange(length)
    moved = (at - shift) % length
    return moved, 2 * (moved // side) + (at < shift)


def neighborhood_windows(size: tuple[int, int], kernel_size: int, dilation: int) -> Run:
    """Clamped, dilated windows with a relative bias: `visionattn.ops.neighborhood_attention`."""
    device = torch.get_default_device()
    (row_keys, row_bias), (col_keys, col_bias) = (neighborhood(n, kernel_size, dilation, device) for n in size)
    seen, where = [], []
    for keys, offsets, n in ((row_keys, row_bias, size[0]), (col_keys, col_bias, size[1])):
        seen.append(torch.zeros(n, n, dtype=torch.bool).scatter_(1, keys, True))
        where.append(torch.zeros(n, n, dtype=torch.int64).scatter_(1, keys, offsets))
    W = size[1]

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return seen[0][i // W, j // W] & seen[1][i % W, j % W]

    def score(bias: Tensor) -> Mod:
        return lambda s, b, h, i, j: s + bias[h, where[0][i // W, j // W], where[1][i % W, j % W]]

    return _attend(mask, score)


def routed(size: tuple[int, int], grid: tuple[int, int], scale: float) -> Run:
    """Regions that attend to the regions routed to them: `visionattn.ops.routed_attention`."""
    rows, cols = (torch.arange(n) // (n // parts) for n, parts in zip(size, grid, strict=True))
    region = (rows[:, None] * grid[1] + cols).flatten()  # (N,)
    regions = grid[0] * grid[1]

    def run(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
        table = torch.zeros(len(q), regions, regions, dtype=torch.bool, device=q.device).scatter_(2, index, True)

        def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return table[b, region[i], region[j]]

        tokens = q.shape[2] * q.shape[3]
        blocks = create_block_mask(mask, len(q), None, tokens, tokens, device=q.device)
        return _call(q, k, v, block_mask=blocks, scale=scale)

    return run


def _attend(mask: Mod, score: Callable[[Tensor], Mod] | None) -> Run:
    """Attend under a mask that is the same for every call, made once."""

    @cache
    def blocks(tokens: int, device: torch.device) -> Any:
        return create_block_mask(mask, None, None, tokens, tokens, device=device)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        mod = None if score is None or bias is None else score(bias)
        return _call(q, k, v, score_mod=mod, block_mask=blocks(q.shape[2] * q.shape[3], q.device))

    return run


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def _call(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    attend: Any = _compiled() if q.device.type == "cuda" else flex_attention  # there is no backward pass on the CPU
    out: Tensor = attend(q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3), **options)
    return out.view(v.shape)
