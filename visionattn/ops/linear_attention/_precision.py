"""Full precision for sums over tokens, whatever the dtype of the tensors and of autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def exact(x: Tensor) -> Tensor:
    """Return ``x`` in fp32, or fp64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Switch autocast off where it is on, so that products of fp32 tensors stay fp32."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()
