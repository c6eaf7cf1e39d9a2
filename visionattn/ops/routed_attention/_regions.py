"""Maps to regions and back: the layout shared by the implementations."""

from torch import Tensor


def to_regions(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cut ``(B, h, H, W, d)`` into row-major regions of row-major tokens: ``(B, h, P, T, d)``."""
    B, h, H, W, d = x.shape
    gh, gw = grid
    x = x.reshape(B, h, gh, H // gh, gw, W // gw, d).transpose(3, 4)
    return x.reshape(B, h, gh * gw, (H // gh) * (W // gw), d)


def to_map(x: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Undo `to_regions`: ``(B, h, P, T, d)``, or with regions and tokens flattened, to ``(B, h, H, W, d)``."""
    B, h, d = x.shape[0], x.shape[1], x.shape[-1]
    (gh, gw), (H, W) = grid, size
    return x.reshape(B, h, gh, gw, H // gh, W // gw, d).transpose(3, 4).reshape(B, h, H, W, d)
