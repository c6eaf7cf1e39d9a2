"""Linear attention: MALA-T's first stages and InLine-Swin-T's, at 224 and at 800 x 1280."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from visionattn.analysis.bench import Case
from visionattn.layers.attention.linear import axial_rotation
from visionattn.ops import linear_attention
from visionattn.testing import randn

Kind = Literal["magnitude_aware", "injective"]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

SHAPES: dict[str, tuple[Kind, int, int, tuple[int, int]]] = {  # normalisation, heads, head width, map
    "MALA-T stage 1 at 224": ("magnitude_aware", 1, 64, (56, 56)),
    "MALA-T stage 2 at 224": ("magnitude_aware", 2, 64, (28, 28)),
    "MALA-T stage 1 at 800x1280": ("magnitude_aware", 1, 64, (200, 320)),
    "MALA-T stage 2 at 800x1280": ("magnitude_aware", 2, 64, (100, 160)),
    "InLine-Swin-T stage 1 at 224": ("injective", 3, 32, (56, 56)),
    "InLine-Swin-T stage 3 at 224": ("injective", 12, 32, (14, 14)),
    "InLine-Swin-T stage 1 at 800x1280": ("injective", 3, 32, (200, 320)),
}


def cases() -> list[Case]:
    """Return one case a stage and image size."""
    return [_case(shape, *numbers) for shape, numbers in SHAPES.items()]


def _case(shape: str, kind: Kind, heads: int, d: int, size: tuple[int, int]) -> Case:
    tokens = size[0] * size[1]
    cos, sin = axial_rotation(*size, d, torch.zeros(()))
    rope = (cos, sin) if kind == "magnitude_aware" else None
    wide = (cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1))  # (N, d)

    def inputs() -> list[Tensor]:
        q, k, v = randn(1, tokens, 3, heads, d).permute(2, 0, 3, 1, 4)  # as a joint projection leaves them
        return [F.elu(q) + 1, F.elu(k) + 1, v] if kind == "magnitude_aware" else [q, k, v]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, normalization=kind, rope=rope)

    def published(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mala_formulation(q, k, v, *wide) if kind == "magnitude_aware" else inline_formulation(q, k, v)

    return Case("linear_attention", shape, inputs, run, published)


def mala_formulation(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """MALA's steps: normaliser, rotation by stacked halves, state of scaled operands, two terms."""
    n, scale = k.shape[2], k.shape[3] ** -0.5
    z = q @ k.mean(dim=2, keepdim=True).transpose(-2, -1) * scale

    def rotate(x: Tensor) -> Tensor:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return x * cos + turned * sin

    q, k = rotate(q), rotate(k)
    state = (k.transpose(-2, -1) * (scale / n) ** 0.5) @ (v * (scale / n) ** 0.5)
    return q @ state * (1 + 1 / (z + 1e-6)) - z * v.mean(dim=2, keepdim=True)


def inline_formulation(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """InLine's steps: state of scaled operands, and the mean value weighted by what the row mean leaves."""
    n, scale = k.shape[2], k.shape[3] ** -0.5
    state = (k.transpose(-2, -1) * (scale / n) ** 0.5) @ (v * (scale / n) ** 0.5)
    left = 1 - scale * (q @ k.mean(dim=2, keepdim=True).transpose(-2, -1))
    return q @ state + left * v.mean(dim=2, keepdim=True)
