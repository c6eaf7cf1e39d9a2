"""The definition, with the windows of keys and values written out."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
) -> str | None:
    """The reference takes everything."""
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
) -> Tensor:
    """Join the logits of the windows and of the pooled tokens, then attend."""
    H, W = q.shape[2:4]
    cells = bias_local.shape[1]
    window = math.isqrt(cells)
    local = (q[..., None, :] * windows(k, window)).sum(dim=-1) + bias_local[:, None, None]  # (B, h, H, W, cells)
    inside = windows(torch.ones_like(q[:1, :1, ..., :1]), window)[..., 0] > 0  # (1, 1, H, W, cells)
    local = local.masked_fill(~inside, -math.inf)
    pooled = q.flatten(2, 3) @ k_pool.transpose(-2, -1) + bias_pool  # (B, h, H * W, P)
    attn = torch.cat([local, pooled.unflatten(2, (H, W))], dim=-1).softmax(dim=-1)
    weights = attn[..., :cells]
    if extra is not None:
        weights = weights + extra
    return (weights[..., None] * windows(v, window)).sum(dim=-2) + attn[..., cells:] @ v_pool[:, :, None]


def windows(x: Tensor, window: int) -> Tensor:
    """Write out the zero-padded window of every token, row by row: ``(B, h, H, W, cells, d)``."""
    H, W = x.shape[2:4]
    r = window // 2
    x = F.pad(x, (0, 0, r, r, r, r))
    rows = [x.narrow(2, y, H) for y in range(window)]
    return torch.stack([row.narrow(3, z, W) for row in rows for z in range(window)], dim=-2)
