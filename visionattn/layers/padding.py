"""Maps that windows do not divide."""

from torch import Tensor
from torch.nn import functional as F


def lacking(length: int, window: int) -> int:
    """Return how many tokens an axis lacks to whole windows.

    The sum is written as a multiple of the window: of ``-length % window`` exporters cannot see that it is one.
    """
    return (length + window - 1) // window * window - length


def pad_to_windows(x: Tensor, height: int, width: int) -> Tensor:
    """Zero-pad the map ``(B, H, W, C)`` at the bottom and right to whole windows of ``height`` by ``width``."""
    H, W = x.shape[1:3]
    if H % height or W % width:
        x = F.pad(x, (0, 0, 0, lacking(W, width), 0, lacking(H, height)))
    return x
