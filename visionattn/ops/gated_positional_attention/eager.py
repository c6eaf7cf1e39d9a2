"""Fast plain PyTorch: fused attention by content, and attention by position one axis at a time.

The positional logits are ``a dx + c dx^2`` plus ``b dy + c dy^2``, so their softmax is the product of a softmax along
the rows and one along the columns: two small matrices for each head instead of one over all pairs of tokens, the same
for every image.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def why_not(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, gate: Tensor, bias: Tensor | None, scale: float
) -> str | None:
    """Plain PyTorch takes everything."""
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, gate: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """Mix the two kinds of attention after each has been applied to the values."""
    a, b, c = position.unbind(-1)  # 3 x (h,)
    by_column = _axis(v.shape[3], a, c, None).to(v.dtype)  # (h, W, W)
    by_row = _axis(v.shape[2], b, c, bias).to(v.dtype)  # (h, H, H)
    by_position = by_column[:, None] @ v  # (B, h, H, W, dv)
    by_position = (by_row @ by_position.flatten(3)).view(v.shape)
    q, k, tokens = (x.flatten(2, 3) for x in (q, k, v))  # 3 x (B, h, N, d)
    by_content = F.scaled_dot_product_attention(q, k, tokens, scale=scale).view(v.shape)
    return torch.lerp(by_content, by_position, gate.to(v.dtype).view(-1, 1, 1, 1))


def _axis(size: int, linear: Tensor, square: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax over keys of one axis: ``(h, size, size)``, in float32 at least."""
    exact = torch.float64 if linear.dtype == torch.float64 else torch.float32
    at = torch.arange(size, device=linear.device, dtype=exact)
    d = at[None, :] - at[:, None]  # key minus query
    logits = linear.to(exact)[:, None, None] * d + square.to(exact)[:, None, None] * d**2
    if bias is not None:
        logits = logits + bias.to(exact)[:, None, None]
    return logits.softmax(dim=-1)
