"""The position bias between agents and tokens: kept as small tables, written out at the size of the map."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class AgentBias(NamedTuple):
    """Bias between ``a`` agents and the tokens of a map, as tables that are resized to any map.

    Between an agent and the token at row i, column j it is ``up(grid)[i, j] + up(rows)[i] + up(cols)[j]``, ``up`` being
    bilinear for ``grid``, linear for the others (pixel centres aligned, no antialiasing). That equals the bilinear
    resizing of the summed map ``rows + cols``.

    Attributes:
        grid: ``(heads, a, g, g')``.
        rows: ``(heads, a, h)``.
        cols: ``(heads, a, w)``.
        prefix: ``(heads, a, P)``, for the tokens before the map, such as a class token.
    """

    grid: Tensor
    rows: Tensor
    cols: Tensor
    prefix: Tensor | None = None


def expand(bias: AgentBias, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Write a bias out: ``(heads, a, P + H * W)``."""
    full = F.interpolate(bias.grid, size=size, mode="bilinear", align_corners=False)  # (heads, a, H, W)
    full = (full + linear(bias.rows, size[0]).unsqueeze(-1) + linear(bias.cols, size[1]).unsqueeze(-2)).flatten(2)
    if bias.prefix is not None:
        full = torch.cat([bias.prefix, full], dim=-1)
    return full.to(dtype)


def linear(x: Tensor, size: int) -> Tensor:
    """Resize the last axis of ``(heads, a, n)`` to ``size``."""
    return x if x.shape[-1] == size else F.interpolate(x, size=size, mode="linear", align_corners=False)
