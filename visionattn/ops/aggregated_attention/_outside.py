"""Cells of windows that lie outside the map."""

from torch import Tensor


def fill_beside(cells: Tensor, value: float) -> None:
    """Set those left and right of the map in ``(..., side, side, H, W)``: a window's cells, and the tokens."""
    r, W = cells.shape[-3] // 2, cells.shape[-1]
    for i in range(r):  # the window's column i and its mirror image
        cells[..., i, :, : r - i] = value
        cells[..., -1 - i, :, max(0, W - r + i) :] = value


def fill_outside(cells: Tensor, value: float) -> None:
    """As `fill_beside`, and those above and below."""
    r, H = cells.shape[-4] // 2, cells.shape[-2]
    for i in range(r):  # the window's row i and its mirror image
        cells[..., i, :, : r - i, :] = value
        cells[..., -1 - i, :, max(0, H - r + i) :, :] = value
    fill_beside(cells, value)
