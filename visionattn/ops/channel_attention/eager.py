"""Plain PyTorch without transposed copies of the tokens: the result is written token by token."""

import torch
from torch import Tensor
from torch.nn import functional as F


def why_not(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """Plain PyTorch takes everything."""
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Scale the small matrix instead of the tokens, and multiply tokens from the left."""
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    attn = ((q.transpose(-2, -1) @ k).to(exact) * scale).softmax(dim=-1)  # (B, g, d, d)
    # Sums over many tokens give steep softmaxes, and denormal weights make CPU matrix products several times slower.
    attn = F.threshold(attn, torch.finfo(exact).tiny, 0.0).to(v.dtype)
    return v @ attn.transpose(-2, -1)
