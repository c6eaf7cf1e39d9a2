"""Bi-level routing attention: every region of queries attends to the few regions routed to it."""

import torch
from torch import Tensor

from visionattn.ops._check import check_maps
from visionattn.ops._dispatch import Impl, choose
from visionattn.ops.routed_attention import eager, reference, triton
from visionattn.ops.routed_attention._regions import to_regions

IMPLS = {"triton": triton, "eager": eager, "reference": reference}


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    *,
    grid: tuple[int, int],
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attend from every region of a map to the regions that ``index`` routes it to.

    The map is cut into ``grid`` regions of equal size, numbered row by row. The queries of region ``p`` attend to all
    keys of the regions ``index[:, p]``, with one softmax over them (BiFormer, arXiv:2303.08810, eq. 5 to 7).

    Args:
        q: Queries ``(B, heads, H, W, d)``; fp16, bf16, fp32 or fp64.
        k: Keys, as ``q``.
        v: Values ``(B, heads, H, W, dv)``.
        index: Routed regions ``(B, P, topk)``, int64 in ``[0, P)``, without repeats in a row; ``P`` is the number of
            regions. Their order does not matter. `topk_regions` makes it.
        grid: Regions along H and W; they must divide H and W.
        scale: Factor on the logits; ``d ** -0.5`` if None. BiFormer's weights need the full width's ``-0.5`` power.
        impl: ``"auto"`` takes the fastest implementation that accepts the input; a named one never falls back.

    Returns:
        ``(B, heads, H, W, dv)`` in the dtype of ``v``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        UnsupportedError: the named implementation cannot take this input; the message says why.
    """
    check_maps("routed_attention", q=q, k=k, v=v)
    B, _, H, W, d = q.shape
    regions = _check_grid("routed_attention", grid, H, W)
    if index.ndim != 3 or index.shape[:2] != (B, regions) or not 1 <= index.shape[2] <= regions:
        raise ValueError(
            f"routed_attention: index must be (B={B}, P={regions}, topk <= P) for grid {tuple(grid)}, "
            f"got {tuple(index.shape)}"
        )
    if index.dtype != torch.int64:
        raise ValueError(f"routed_attention: index must be int64, got {index.dtype}")
    args = (q, k, v, index, (grid[0], grid[1]), d**-0.5 if scale is None else scale)
    return choose("routed_attention", impl, IMPLS, *args).forward(*args)


def topk_regions(
    q: Tensor, k: Tensor, *, grid: tuple[int, int], topk: int, valid: tuple[int, int] | None = None
) -> Tensor:
    """Route: for every region, the ``topk`` regions whose mean key is most like its mean query.

    Means are over tokens and kept for each head; the affinity sums over heads and channels (BiFormer, arXiv:2303.08810,
    eq. 3 and 4). No gradient flows through the choice.

    Args:
        q: Queries ``(B, heads, H, W, d)``.
        k: Keys, as ``q``.
        grid: Regions along H and W; they must divide H and W.
        topk: Regions to keep; all of them if there are fewer.
        valid: ``(H, W)`` of the part of the map that is not padding, at its top left; tokens outside, which must be
            zero, are then left out of the means. All tokens count if None.

    Returns:
        Region numbers ``(B, P, min(topk, P))``, int64, by falling affinity.
    """
    check_maps("topk_regions", q=q, k=k)
    H, W = q.shape[2:4]
    regions = _check_grid("topk_regions", grid, H, W)
    with torch.no_grad():
        q, k = (to_regions(x, grid).mean(dim=3) for x in (q, k))  # (B, heads, P, d)
        if valid is not None:
            share = _share(valid[0], H, grid[0], q)[:, None] * _share(valid[1], W, grid[1], q)[None]
            q, k = (x / share.reshape(-1, 1) for x in (q, k))
        q, k = (x.transpose(1, 2).flatten(2) for x in (q, k))  # (B, P, heads * d)
        return (q @ k.transpose(1, 2)).topk(min(topk, regions), dim=-1).indices


def _share(valid: int, size: int, parts: int, like: Tensor) -> Tensor:
    """Share of valid tokens in each of ``parts`` equal spans of an axis: ``(parts,)``."""
    span = size // parts
    starts = torch.arange(parts, device=like.device) * span
    return ((valid - starts).clamp(0, span) / span).to(like.dtype)


def _check_grid(op: str, grid: tuple[int, int], H: int, W: int) -> int:
    if grid[0] < 1 or grid[1] < 1 or H % grid[0] or W % grid[1]:
        raise ValueError(f"{op}: grid {tuple(grid)} must divide the map's {H} x {W} tokens; pad the map first")
    return grid[0] * grid[1]
