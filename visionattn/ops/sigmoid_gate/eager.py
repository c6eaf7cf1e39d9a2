"""Plain PyTorch: forward as the definition to the last bit, without the pass for a factor of one."""

from torch import Tensor


def why_not(y: Tensor, logits: Tensor, scale: float) -> str | None:
    """Plain PyTorch takes everything."""
    return None


def forward(y: Tensor, logits: Tensor, scale: float) -> Tensor:
    """Multiply by the gate."""
    gate = logits.sigmoid()
    if scale != 1:  # under the same name: the memory of the first serves the product below
        gate = gate * scale if gate.requires_grad else gate.mul_(scale)
    if gate.shape[1] == gate.shape[3] == 1:
        # A factor for each of a token's numbers makes longer loops than one a head; and its gradient is summed over
        # tokens first and over channels last, which is faster than over both at once.
        gate = gate.expand(-1, -1, -1, y.shape[3]).contiguous()
    gated = y * gate
    return gated if gated.dtype == y.dtype else gated.to(y.dtype)
