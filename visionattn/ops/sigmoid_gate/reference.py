"""The definition."""

from torch import Tensor


def why_not(y: Tensor, logits: Tensor, scale: float) -> str | None:
    """The reference takes everything."""
    return None


def forward(y: Tensor, logits: Tensor, scale: float) -> Tensor:
    """Multiply by the scaled gate."""
    return (y * (logits.sigmoid() * scale)).to(y.dtype)
