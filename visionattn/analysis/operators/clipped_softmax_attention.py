"""ViT-S/16's attention with clipped softmax: 196 patches and a class token at 224, 4200 and one at 800 x 1344."""

import torch
from torch import Tensor

from visionattn.analysis.bench import Case
from visionattn.ops import clipped_softmax_attention
from visionattn.testing import randn

HEADS, DIM = 6, 64  # of the model, of a head
SHAPES = {"224": (4, 197), "512": (1, 1025), "800x1344": (1, 4201)}  # batch, tokens


def cases() -> list[Case]:
    """Return one case an image size, and one with both ends clipped."""
    return [_case(side, *numbers, 1.0) for side, numbers in SHAPES.items()] + [_case("224", 4, 197, 1.003)]


def _case(side: str, batch: int, tokens: int, zeta: float) -> Case:
    gamma = -2 / tokens

    def inputs() -> list[Tensor]:
        return [randn(batch, HEADS, tokens, DIM, seed=i) for i in range(3)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return clipped_softmax_attention(q, k, v, gamma=gamma, zeta=zeta)

    def published(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return materialised_formulation(q, k, v, gamma, zeta)

    return Case("clipped_softmax_attention", f"ViT-S/16 at {side}, zeta {zeta:g}", inputs, run, published)


def materialised_formulation(q: Tensor, k: Tensor, v: Tensor, gamma: float, zeta: float) -> Tensor:
    """As published: softmax, stretch and clip, each a whole matrix."""
    attn = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1), dim=-1)
    return torch.clip((zeta - gamma) * attn + gamma, 0, 1) @ v
