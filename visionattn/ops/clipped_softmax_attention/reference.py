"""The definition, with the attention matrix written out."""

import torch
from torch import Tensor


def why_not(q: Tensor, k: Tensor, v: Tensor, gamma: float, zeta: float, scale: float) -> str | None:
    """The reference takes everything."""
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, gamma: float, zeta: float, scale: float) -> Tensor:
    """Softmax, stretch, clip, sum."""
    exact = torch.promote_types(q.dtype, torch.float32)
    attn = ((q * scale) @ k.transpose(-2, -1)).softmax(dim=-1, dtype=exact)  # (B, h, N, S)
    attn = ((zeta - gamma) * attn + gamma).clamp(0.0, 1.0)
    return attn.to(v.dtype) @ v
