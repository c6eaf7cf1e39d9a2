"""What autocast would do to a tensor, and a product that it leaves alone."""

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast casts to on the device of ``x``, or None where it is off."""
    device = x.device.type
    on = device != "meta" and torch.is_autocast_enabled(device)  # which knows of no autocast on the meta device
    return torch.get_autocast_dtype(device) if on else None


def exact_bmm(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``, batched, in their own precision: autocast leaves results alone that have a place already."""
    return torch.bmm(a, b, out=a.new_empty(a.shape[0], a.shape[1], b.shape[2]))
