"""InfViT's attention, pure and linear: 196 patches and a class token at 224, 1024 and one at 512, 4096 at 1024."""

import torch
from torch import Tensor

from visionattn.analysis.bench import Case
from visionattn.ops import infinite_attention
from visionattn.ops.infinite_attention import Form
from visionattn.testing import randn

DIM = 64  # of a head
SHAPES = {"InfViT-4L at 224": (2, 16, 197), "InfViT-4L at 512": (1, 16, 1025), "InfViT-S6 at 1024": (1, 6, 4097)}
FORMS: tuple[Form, ...] = ("pure", "linear")


def cases() -> list[Case]:
    """Return one case a form and image size."""
    return [_case(form, shape, *numbers) for form in FORMS for shape, numbers in SHAPES.items()]


def _case(form: Form, shape: str, batch: int, heads: int, tokens: int) -> Case:
    rho = torch.tensor(0.9)

    def inputs() -> list[Tensor]:
        return [*(randn(batch, heads, tokens, DIM, seed=i) for i in range(3)), rho]

    def run(q: Tensor, k: Tensor, v: Tensor, rho: Tensor) -> Tensor:
        return infinite_attention(q, k, v, rho, form=form)

    published = materialised_formulation if form == "pure" else pooled_formulation
    return Case("infinite_attention", f"{shape}, {form}", inputs, run, published, unbatched=(3,))


def materialised_formulation(q: Tensor, k: Tensor, v: Tensor, rho: Tensor) -> Tensor:
    """The pure form as published: scores, their rectification, normalisation and discount, each a whole matrix.

    But for the norm, which is taken by rows first: over 16 million numbers at once, in fp32, it is off by 2e-4.
    """
    q, k = q / q.shape[-1] ** 0.5, k / k.shape[-1] ** 0.5
    attn = torch.relu(q @ k.transpose(-2, -1))
    attn = attn / (attn.norm(dim=-1).norm(dim=-1)[..., None, None] + 1e-6)
    return (rho * attn) @ v


def pooled_formulation(q: Tensor, k: Tensor, v: Tensor, rho: Tensor) -> Tensor:
    """The linear form as published: each weighted sum a product of whole tensors, then a sum."""
    q, k = q / q.shape[-1] ** 0.5, k / k.shape[-1] ** 0.5
    weights = q.norm(dim=-1, keepdim=True)
    weights = weights / (weights.sum(dim=2, keepdim=True) + 1e-6)
    mean = (weights * q).sum(dim=2, keepdim=True)
    attn = torch.relu((mean * k).sum(dim=-1, keepdim=True))
    attn = attn / (attn.sum(dim=2, keepdim=True) + 1e-6)
    return (rho * attn * v).sum(dim=2, keepdim=True)
