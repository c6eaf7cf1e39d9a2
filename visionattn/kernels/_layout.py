"""How launchers lay out what they return. Known to `visionattn.ops` too, which must say so without Triton."""

from collections.abc import Sequence

import torch
from torch import Tensor


def heads_last(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Return fresh ``(B, heads, tokens..., d)`` whose heads lie next to its channels in memory.

    Models join the heads of a token next: ``(B, tokens..., heads * d)`` is then a view.
    """
    out = like.new_empty((shape[0], *shape[2:-1], shape[1], shape[-1]), dtype=dtype)
    return out.movedim(-2, 1)


def rows(x: Tensor) -> Tensor:
    """Return ``x`` with neighbouring channels side by side, which kernels read in runs; copied only if they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
