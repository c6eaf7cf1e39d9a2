"""Where the neighbourhood of a token lies along one axis: the definition shared by the implementations."""

import torch
from torch import Tensor

Pair = tuple[int, int]


def neighborhood(length: int, kernel_size: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the neighbours of every token of an axis, and where they lie from it.

    Tokens of equal index modulo ``dilation`` form a class; a token sees ``kernel_size`` consecutive tokens of its
    class, itself in the middle, the window being shifted inwards at the ends.

    Returns:
        keys: ``(length, kernel_size)``, int64, indices of the neighbours on the axis.
        offsets: ``(length, kernel_size)``, int64, key minus query, counted in the class, plus ``kernel_size - 1``.
    """
    index = torch.arange(length, device=device)
    residue, position = index % dilation, index // dilation
    size = (length - 1 - residue) // dilation + 1  # of the class
    start = torch.minimum((position - kernel_size // 2).clamp(min=0), size - kernel_size)
    keys = start[:, None] + torch.arange(kernel_size, device=device)  # positions in the class
    return keys * dilation + residue[:, None], keys - position[:, None] + kernel_size - 1
