"""The definition, with the attention matrix written out."""

import torch
from torch import Tensor


def why_not(q: Tensor, k: Tensor, v: Tensor, rho: Tensor, form: str, scale: float, eps: float) -> str | None:
    """The reference takes everything."""
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, rho: Tensor, form: str, scale: float, eps: float) -> Tensor:
    """Normalise the scores as a whole; in the linear form, those of one mean query alone."""
    exact = torch.promote_types(q.dtype, torch.float32)  # sums over many small scores need it
    q, k = q * scale**0.5, k * scale**0.5
    if form == "pure":
        scores = (q @ k.transpose(-2, -1)).relu()  # (B, h, N, S)
        # Rows first: in fp32, PyTorch's norm over millions of numbers at once is off by 1e-4.
        rows = torch.linalg.vector_norm(scores, dim=-1, keepdim=True, dtype=exact)
        total = torch.linalg.vector_norm(rows, dim=-2, keepdim=True)
    else:
        weights = torch.linalg.vector_norm(q, dim=-1, keepdim=True, dtype=exact)  # (B, h, N, 1)
        weights = weights / (weights.sum(dim=-2, keepdim=True) + eps)
        query = (weights * q).sum(dim=-2, keepdim=True)  # (B, h, 1, d)
        scores = (query @ k.to(exact).transpose(-2, -1)).relu()  # (B, h, 1, S)
        total = scores.sum(dim=-1, keepdim=True)
    attn = (scores / (total + eps)).to(v.dtype)
    return rho.to(v.dtype).reshape(-1, 1, 1) * (attn @ v)
