"""Plain PyTorch: as the definition to the last bit, without the pass for a factor of one."""

from torch import Tensor


def why_not(y: Tensor, logits: Tensor, scale: float) -> str | None:
    """Plain PyTorch takes everything."""
    return None


def forward(y: Tensor, logits: Tensor, scale: float) -> Tensor:
    """Multiply by the gate."""
    gate = logits.sigmoid()
    return (y * (gate if scale == 1 else gate * scale)).to(y.dtype)
