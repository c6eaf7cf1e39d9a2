"""The definition, with both matrices of weights written out."""

import torch
from torch import Tensor


def why_not(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, gate: Tensor, bias: Tensor | None, scale: float
) -> str | None:
    """The reference takes everything."""
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, position: Tensor, gate: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """Mix two softmaxes over all keys, then attend."""
    H, W = q.shape[2:4]
    row, column = torch.meshgrid(torch.arange(H, device=q.device), torch.arange(W, device=q.device), indexing="ij")
    dx, dy = (x.flatten()[None, :] - x.flatten()[:, None] for x in (column, row))  # (N, N): key minus query
    r = torch.stack([dx, dy, dx**2 + dy**2], dim=-1).to(position.dtype)  # (N, N, 3)
    logits = torch.einsum("nmr,hr->hnm", r, position)
    if bias is not None:
        logits = logits + bias[:, None, None]
    by_position = logits.softmax(dim=-1).to(v.dtype)
    q, k, tokens = (x.flatten(2, 3) for x in (q, k, v))  # (B, h, N, d)
    by_content = (q * scale @ k.transpose(-2, -1)).softmax(dim=-1)
    gate = gate.to(v.dtype)[:, None, None]
    return (((1 - gate) * by_content + gate * by_position) @ tokens).reshape(v.shape)
