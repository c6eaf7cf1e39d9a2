"""The definitions, term by term, in fp32 at least."""

import torch
from torch import Tensor

from visionattn.ops.linear_attention._precision import exact, no_autocast


def why_not(
    q: Tensor, k: Tensor, v: Tensor, normalization: str, rope: tuple[Tensor, Tensor] | None, scale: float, eps: float
) -> str | None:
    """The reference takes everything."""
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, normalization: str, rope: tuple[Tensor, Tensor] | None, scale: float, eps: float
) -> Tensor:
    """Sum keys times values into the state, multiply by the queries, normalise."""
    dtype = v.dtype
    with no_autocast(q):
        q, k, v = exact(q), exact(k), exact(v)
        if normalization == "injective":
            k = k - k.mean(dim=2, keepdim=True)
            return (v.mean(dim=2, keepdim=True) + q @ _state(k, v, scale)).to(dtype)
        rotated = (q, k) if rope is None else (rotate(q, *rope), rotate(k, *rope))
        y = rotated[0] @ _state(rotated[1], v, scale)  # (B, h, N, dv)
        z = scale * (q * k.mean(dim=2, keepdim=True)).sum(dim=-1, keepdim=True)  # (B, h, N, 1)
        if normalization == "sum":
            return (y / (z + eps * scale / k.shape[2])).to(dtype)
        return (y * (1 + 1 / (z + eps)) - z * v.mean(dim=2, keepdim=True)).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs of ``x (B, h, N, d)`` by angles given as ``(N, d / 2)``."""
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def _state(k: Tensor, v: Tensor, scale: float) -> Tensor:
    """``(scale / n) sum_j k_j^T v_j``: ``(B, h, d, dv)``."""
    return (k * (scale / k.shape[2])).transpose(-2, -1) @ v
