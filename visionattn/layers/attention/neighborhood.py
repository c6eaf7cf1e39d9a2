"""Neighbourhood attention of NAT and DiNAT."""

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from visionattn.ops import Impl, neighborhood_attention
from visionattn.ops._dispatch import open_size


class NeighborhoodAttention(nn.Module):
    """Attention of every token to the tokens around it. ``(B, H, W, C)`` to ``(B, H, W, C)`` at any size.

    A map smaller than ``kernel_size * dilation`` is zero-padded at the bottom and right before the projection, so that
    padded tokens are keys and values that equal the bias of the projection, as in NATTEN up to 0.15.1, which the
    published weights were trained with.

    Args:
        dim: Channels.
        num_heads: Heads; ``dim`` must be a multiple.
        kernel_size: Keys along each axis.
        dilation: Distance between neighbours.
        rel_pos_bias: Learn a bias for each relative position and head.
        impl: Implementation of `visionattn.ops.neighborhood_attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        rel_pos_bias: bool = True,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        if kernel_size < 1 or dilation < 1:
            raise ValueError(f"kernel_size and dilation must be at least 1, got {kernel_size} and {dilation}")
        self.num_heads, self.kernel_size, self.dilation, self.impl = num_heads, kernel_size, dilation, impl
        self.qkv = nn.Linear(dim, 3 * dim)
        side = 2 * kernel_size - 1
        self.rpb = nn.Parameter(torch.zeros(num_heads, side, side)) if rel_pos_bias else None
        self.proj = nn.Linear(dim, dim)
        if self.rpb is not None:
            trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        least = self.kernel_size * self.dilation
        if open_size(H, W) or min(H, W) < least:
            x = F.pad(x, (0, 0, 0, max(0, least - W), 0, max(0, least - H)))
        q, k, v = self.qkv(x).unflatten(3, (3, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)  # 3 x (B, h, H', W', d)
        y = neighborhood_attention(
            q, k, v, self.rpb, kernel_size=self.kernel_size, dilation=self.dilation, impl=self.impl
        )
        return self.proj(y.permute(0, 2, 3, 1, 4).flatten(3)[:, :H, :W])
