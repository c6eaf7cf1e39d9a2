"""Parameters that are for one size of map, and how they follow to another."""

from collections.abc import Mapping

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

Size = tuple[int, int]


class SizedTables(nn.Module):
    """Base of modules that hold tables for one size of map (or window); all their own parameters are such tables.

    Subclasses say in `table_shape` how large each table is at a size, and in `resize` how one follows to a shape.
    """

    def table_shape(self, name: str, size: Size) -> tuple[int, ...]:
        """Return the shape of the table ``name`` for a map of ``size``."""
        raise NotImplementedError

    def resize(self, table: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return ``table`` brought to ``shape``."""
        raise NotImplementedError

    def set_size(self, size: Size) -> None:
        """Make the tables, resized, those of maps of ``size``."""
        for name, table in list(self.named_parameters(recurse=False)):
            shape = self.table_shape(name, size)
            if table.shape != shape:
                new = table.new_empty(shape) if table.is_meta else self.resize(table.detach(), shape).contiguous()
                setattr(self, name, nn.Parameter(new, requires_grad=table.requires_grad))


class PositionEmbedding(SizedTables):
    """Adds a learned map to a map ``(B, H, W, C)``, resized (bilinear) where the sizes differ.

    Args:
        dim: Channels.
        size: ``(H, W)`` of the learned map.
    """

    def __init__(self, dim: int, size: Size) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*size, dim))
        trunc_normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        pos: Tensor = self.weight
        if x.shape[1:3] != pos.shape[:2]:
            pos = pos.permute(2, 0, 1).unsqueeze(0)
            pos = F.interpolate(pos, size=x.shape[1:3], mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
        return x + pos

    def table_shape(self, name: str, size: Size) -> tuple[int, ...]:
        """The map's shape."""
        return (*size, self.weight.shape[-1])

    def resize(self, table: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Resize for good: bicubic."""
        table = table.permute(2, 0, 1).unsqueeze(0)
        return F.interpolate(table, size=shape[:2], mode="bicubic", align_corners=False)[0].permute(1, 2, 0)


def fit_tables(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` with the tables in it that are for another size resized to those of ``model``."""
    state = dict(state)
    for prefix, module in model.named_modules():
        if isinstance(module, SizedTables):
            for name, own in module.named_parameters(recurse=False):
                key = f"{prefix}.{name}"
                if key in state and state[key].shape != own.shape and state[key].ndim == own.ndim:
                    state[key] = module.resize(state[key], tuple(own.shape))
    return state
