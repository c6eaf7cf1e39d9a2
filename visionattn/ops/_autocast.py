"""What autocast would do to a tensor."""

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast casts to on the device of ``x``, or None where it is off."""
    device = x.device.type
    on = device != "meta" and torch.is_autocast_enabled(device)  # which knows of no autocast on the meta device
    return torch.get_autocast_dtype(device) if on else None
