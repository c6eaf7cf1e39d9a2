"""TransNeXt-T's aggregated attention: the stage shapes at 224 and, as in detection, at 800 x 800."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from visionattn.analysis.bench import Case
from visionattn.ops import aggregated_attention
from visionattn.testing import randn

DIM = 24  # of a head
SHAPES = {  # batch, heads, side of the map, side of the pooled map
    "stage 1 at 224": (1, 3, 56, 7),
    "stage 2 at 224": (1, 6, 28, 7),
    "stage 3 at 224": (1, 12, 14, 7),
    "stage 1 at 224, batch 8": (8, 3, 56, 7),
    "stage 2 at 224, batch 8": (8, 6, 28, 7),
    "stage 3 at 224, batch 8": (8, 12, 14, 7),
    "stage 1 at 800": (1, 3, 200, 25),
    "stage 2 at 800": (1, 6, 100, 25),
    "stage 3 at 800": (1, 12, 50, 25),
    "stage 1 at 800, 7x7 pool": (1, 3, 200, 7),
}


def cases() -> list[Case]:
    """Return one case a stage and image size."""
    return [_case(shape, *numbers) for shape, numbers in SHAPES.items()]


def _case(shape: str, batch: int, heads: int, side: int, pooled: int) -> Case:
    def inputs() -> list[Tensor]:
        q, k, v = (randn(batch, heads, side, side, DIM, seed=i) for i in range(3))
        k_pool, v_pool = (randn(batch, heads, pooled**2, DIM, seed=i) for i in (3, 4))
        bias_pool = randn(heads, side**2, pooled**2, seed=6)
        return [q, k, v, k_pool, v_pool, randn(heads, 9, seed=5), bias_pool, randn(batch, heads, side, side, 9, seed=7)]

    return Case(
        "aggregated_attention",
        f"TransNeXt-T {shape}",
        inputs,
        aggregated_attention,
        unfold_formulation,
        unbatched=(5, 6),
    )


def unfold_formulation(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor,
) -> Tensor:
    """The published PyTorch path: keys and values unfolded to 3x3 windows, two logits joined, softmax, split."""
    B, heads, H, W, _ = q.shape
    N, P = H * W, k_pool.shape[2]

    def windows(x: Tensor) -> Tensor:  # (B, h, N, d, 9)
        planes = x.permute(0, 1, 4, 2, 3).reshape(B, -1, H, W)
        return F.unfold(planes, 3, padding=1).view(B, heads, -1, 9, N).permute(0, 1, 4, 2, 3)

    outside = F.unfold(torch.ones(1, 1, H, W, dtype=q.dtype, device=q.device), 3, padding=1).transpose(1, 2) == 0
    q, extra = q.flatten(2, 3), extra.flatten(2, 3)
    local = (q[..., None, :] @ windows(k))[..., 0, :] + bias_local[:, None]
    pooled = q @ k_pool.transpose(-2, -1) + bias_pool
    attn = torch.cat([local.masked_fill(outside, -math.inf), pooled], dim=-1).softmax(dim=-1)
    local, pooled = attn.split([9, P], dim=-1)
    y = ((local + extra)[..., None, :] @ windows(v).transpose(-2, -1))[..., 0, :] + pooled @ v_pool
    return y.view(B, heads, H, W, -1)
