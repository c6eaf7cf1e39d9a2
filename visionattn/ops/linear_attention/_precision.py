"""Full precision for sums over tokens, whatever the dtype of the tensors and of autocast."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from visionattn.ops._autocast import autocast_dtype


def exact(x: Tensor) -> Tensor:
    """Return ``x`` in fp32, or fp64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Switch autocast off where it is on, so that products of fp32 tensors stay fp32."""
    return nullcontext() if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)
