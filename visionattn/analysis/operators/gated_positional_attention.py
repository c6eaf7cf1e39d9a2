"""ConViT's gated positional attention on its 14 x 14 map at 224, and on the map of a larger image."""

import torch
from torch import Tensor

from visionattn.analysis.bench import Case
from visionattn.ops import gated_positional_attention
from visionattn.testing import randn

DIM = 48  # of a head
SHAPES = {  # batch, heads, map
    "ConViT-Ti at 224": (1, 4, (14, 14)),
    "ConViT-Ti at 224, batch 8": (8, 4, (14, 14)),
    "ConViT-B at 224": (1, 16, (14, 14)),
    "ConViT-Ti at 512x768": (1, 4, (32, 48)),
}


def cases() -> list[Case]:
    """Return one case a shape."""
    return [_case(shape, *numbers) for shape, numbers in SHAPES.items()]


def _case(shape: str, batch: int, heads: int, size: tuple[int, int]) -> Case:
    def inputs() -> list[Tensor]:
        q, k, v = (randn(batch, heads, *size, DIM, seed=i) for i in range(3))
        return [q, k, v, randn(heads, 3, seed=3) * 0.1, randn(heads, seed=4).sigmoid()]

    return Case("gated_positional_attention", shape, inputs, gated_positional_attention, published, unbatched=(3, 4))


def published(q: Tensor, k: Tensor, v: Tensor, position: Tensor, gate: Tensor) -> Tensor:
    """The authors' order: positional scores for every image, two softmaxes, their mixture, renormalised."""
    B, _, H, W, d = q.shape
    row, column = torch.meshgrid(torch.arange(H, device=q.device), torch.arange(W, device=q.device), indexing="ij")
    dx, dy = (x.flatten()[None, :] - x.flatten()[:, None] for x in (column, row))
    r = torch.stack([dx, dy, dx**2 + dy**2], dim=-1).to(q.dtype).expand(B, -1, -1, -1)  # (B, N, N, 3)
    by_position = (r @ position.T).permute(0, 3, 1, 2).softmax(dim=-1)
    q, k, tokens = (x.flatten(2, 3) for x in (q, k, v))
    by_content = ((q @ k.transpose(-1, -2)) * d**-0.5).softmax(dim=-1)
    gate = gate.view(1, -1, 1, 1)
    attn = (1 - gate) * by_content + gate * by_position
    attn = attn / attn.sum(dim=-1, keepdim=True)
    return (attn @ tokens).view(v.shape)
