"""Plain PyTorch: as the definition to the last bit, without the pass for a factor of one."""

from torch import Tensor


def why_not(y: Tensor, logits: Tensor, scale: float) -> str | None:
    """Plain PyTorch takes everything."""
    return None


def forward(y: Tensor, logits: Tensor, scale: float) -> Tensor:
    """Multiply by the gate."""
    gate = logits.sigmoid()
    if scale != 1:
        gate = gate * scale  # under the same name: the memory of the first serves the product
    gated = y * gate
    return gated if gated.dtype == y.dtype else gated.to(y.dtype)
