"""The definition."""

from torch import Tensor


def why_not(q: Tensor, k: Tensor, v: Tensor, scale: float) -> str | None:
    """The reference takes everything."""
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Score channels against channels, then mix the channels of every token."""
    attn = (q.transpose(-2, -1) @ k * scale).softmax(dim=-1)  # (B, g, d, d)
    return (attn @ v.transpose(-2, -1)).transpose(-2, -1)
