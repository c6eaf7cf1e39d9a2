"""Fast plain PyTorch: few passes over the tokens, rotation as one complex product.

Everything that is as small as the state (scales, means, the row mean of the logits) is folded into the state.
"""

import torch
from torch import Tensor

from visionattn.ops._dispatch import exporting
from visionattn.ops.linear_attention._precision import exact, no_autocast


def why_not(
    q: Tensor, k: Tensor, v: Tensor, normalization: str, rope: tuple[Tensor, Tensor] | None, scale: float, eps: float
) -> str | None:
    """Everything runs, but exporters cannot take complex numbers."""
    return "it rotates by complex numbers, which exporters lack" if rope is not None and exporting() else None


def forward(
    q: Tensor, k: Tensor, v: Tensor, normalization: str, rope: tuple[Tensor, Tensor] | None, scale: float, eps: float
) -> Tensor:
    """Sum keys times values into the state, multiply by the queries, normalise."""
    dtype, count = v.dtype, k.shape[2]
    with no_autocast(q):
        q, k, v = exact(q), exact(k), exact(v)
        factor = scale / count
        k_mean = k.mean(dim=2, keepdim=True)
        if normalization == "injective":
            state = (k - k_mean).transpose(-2, -1) @ v * factor  # (B, h, d, dv)
            v_mean = v.mean(dim=2, keepdim=True)
            y = torch.baddbmm(v_mean.flatten(0, 1), q.flatten(0, 1), state.flatten(0, 1))
            return y.unflatten(0, q.shape[:2]).to(dtype)
        z = q @ (k_mean.transpose(-2, -1) * scale)  # (B, h, N, 1)
        if rope is not None:
            turn = _turn(q, *rope)
            q, k = _rotate(q, turn), _rotate(k, turn)
        y = q @ (k.transpose(-2, -1) @ v * factor)  # (B, h, N, dv)
        if normalization == "sum":
            return (y * (1 / (z + eps * factor))).to(dtype)
        v_mean = v.mean(dim=2, keepdim=True)
        return torch.addcmul(y * (1 + 1 / (z + eps)), z, v_mean, value=-1).to(dtype)


def _turn(like: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``e^(i angle)`` as ``(N, d / 2)`` complex numbers; cosines and sines side by side where complex is unwanted."""
    parts = torch.stack([cos, sin], dim=-1).to(like.dtype)
    return parts if torch.compiler.is_compiling() else torch.view_as_complex(parts)


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    pairs = x.unflatten(-1, (-1, 2))  # (B, h, N, d / 2, 2)
    if turn.is_complex():
        if pairs.stride(-1) != 1 or any(s % 2 for s in pairs.stride()[:-1]) or x.storage_offset() % 2:
            pairs = pairs.contiguous()
        return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2)
    # Compilers fuse this, and cannot generate code for complex numbers.
    (a, b), (cos, sin) = pairs.unbind(-1), turn.unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
