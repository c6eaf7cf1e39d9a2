"""BiFormer-S's routed attention: the stage shapes at 224 (7 x 7 regions) and at 800 x 1344 (16 x 16, padded)."""

import torch
from torch import Tensor

from visionattn.analysis import flex
from visionattn.analysis.bench import Case
from visionattn.ops import routed_attention
from visionattn.testing import randn

DIM = 32  # of a head
SHAPES = {  # heads, map, regions a side, topk; stage 4 attends to all of its map
    "stage 1 at 224": (2, (56, 56), 7, 1),
    "stage 2 at 224": (4, (28, 28), 7, 4),
    "stage 3 at 224": (8, (14, 14), 7, 16),
    "stage 4 at 224": (16, (7, 7), 1, 1),
    "stage 1 at 800x1344": (2, (208, 336), 16, 1),
    "stage 2 at 800x1344": (4, (112, 176), 16, 4),
    "stage 3 at 800x1344": (8, (64, 96), 16, 16),
    "stage 4 at 800x1344": (16, (25, 42), 1, 1),
}


def cases() -> list[Case]:
    """Return one case a stage and image size."""
    return [_case(shape, *numbers) for shape, numbers in SHAPES.items()]


def _case(shape: str, heads: int, size: tuple[int, int], side: int, topk: int) -> Case:
    H, W = size
    scale = (heads * DIM) ** -0.5

    def inputs() -> list[Tensor]:
        q, k, v = (randn(1, heads, H, W, DIM, seed=i) for i in range(3))
        return [q, k, v, randn(1, side**2, side**2, seed=3).topk(topk).indices]

    def run(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
        return routed_attention(q, k, v, index, grid=(side, side), scale=scale)

    def published(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
        return gather_formulation(q, k, v, index, side, scale)

    others = {"FlexAttention": flex.routed(size, (side, side), scale)}
    return Case("routed_attention", f"BiFormer-S {shape}", inputs, run, published, gpu_others=others)


def gather_formulation(q: Tensor, k: Tensor, v: Tensor, index: Tensor, side: int, scale: float) -> Tensor:
    """The paper's algorithm 1: gather full-width keys and values of the routed regions, then split heads."""
    B, heads, H, W, d = q.shape
    h, w = H // side, W // side
    P, T, C = side**2, h * w, heads * d

    def regions(x: Tensor) -> Tensor:  # (B, P, T, C)
        x = x.permute(0, 2, 3, 1, 4).reshape(B, side, h, side, w, C)
        return x.transpose(2, 3).reshape(B, P, T, C)

    q, kv = regions(q), torch.cat([regions(k), regions(v)], dim=-1)
    topk = index.shape[-1]
    index = index[..., None, None].expand(-1, -1, -1, T, 2 * C)
    gathered = kv[:, None].expand(-1, P, -1, -1, -1).gather(2, index)  # (B, P, topk, T, 2C)
    k, v = gathered.reshape(B * P, topk * T, 2, heads, d).permute(2, 0, 3, 1, 4)  # 2 x (B * P, heads, topk * T, d)
    q = q.reshape(B * P, T, heads, d).transpose(1, 2)
    y = ((q * scale) @ k.transpose(-2, -1)).softmax(-1) @ v  # (B * P, heads, T, d)
    y = y.transpose(1, 2).reshape(B, side, side, h, w, C).transpose(2, 3)
    return y.reshape(B, H, W, heads, d).permute(0, 3, 1, 2, 4)
