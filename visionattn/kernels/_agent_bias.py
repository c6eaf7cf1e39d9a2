"""The position bias of agent attention inside kernels: small tables, interpolated where they are used.

Between an agent and the token at row i, column j it is ``up(grid)[i, j] + up(rows)[i] + up(columns)[j]``. The grid is
resized to all rows beforehand, with the rows added, and the columns are: tables that grow with the sides of the map
alone, of which a token needs three entries. They are laid agents last, so that neighbouring threads read neighbours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels._blocks import LOG2E
from visionattn.kernels._launch import Config, launch

Bias = tuple[Tensor, Tensor, Tensor, Tensor | None]  # (h, a, g, g'), (h, a, n), (h, a, m), (h, a, P)


def map_sizes(bias: Bias | None, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Prefix tokens, height, width, and columns of the bias's grid."""
    if bias is None:
        return 0, 1, 1, 1
    return 0 if bias[3] is None else bias[3].shape[2], *size, bias[0].shape[3]


def resized(bias: Bias | None, size: tuple[int, int], like: Tensor) -> Tensor:
    """A bias as the kernels take it, ``(h, H * g' + W + P, a)``: the grid resized to all rows of the map, with the rows
    added; the columns resized; the prefix. In fp32 and units of log 2. Without a bias, ``like``, which is not read.
    """
    if bias is None:
        return like
    grid, by_row, by_column = (x.contiguous() for x in bias[:3])
    prefix = grid if bias[3] is None else bias[3].contiguous()
    P, H, W, grid_w = map_sizes(bias, size)
    h, a, grid_h, _ = grid.shape
    tables = grid.new_empty(h, H * grid_w + W + P, a, dtype=torch.float32)
    launch(
        _resize,
        lambda b: h * triton.cdiv(tables.shape[1], b["BLOCK_R"]) * triton.cdiv(a, b["BLOCK_A"]),
        *(grid, by_row, by_column, prefix, tables, a, P, H, W, grid_h, grid_w, by_row.shape[2], by_column.shape[2]),
        LOG2E,
        configs=[Config({"BLOCK_R": 16, "BLOCK_A": 32}, warps=4)],
    )
    return tables


def to_tables(dbias: Tensor, bias: Bias, size: tuple[int, int]) -> Bias:
    """Sum the gradient of a written-out bias ``(h, N, a)`` into those of its tables."""
    grid, by_row, by_column, prefix = bias
    before = dbias.shape[1] - size[0] * size[1]
    on_map = dbias[:, before:].unflatten(1, size)  # (h, H, W, a)
    half = _taps(size[1], grid.shape[3], dbias).T @ on_map  # (h, H, g', a)
    dgrid = (_taps(size[0], grid.shape[2], dbias).T @ half.flatten(2)).unflatten(2, half.shape[2:])  # (h, g, g', a)
    dgrid = dgrid.permute(0, 3, 1, 2)
    drows = (_taps(size[0], by_row.shape[2], dbias).T @ half.sum(2)).transpose(1, 2)
    dcolumns = (_taps(size[1], by_column.shape[2], dbias).T @ on_map.sum(1)).transpose(1, 2)
    dprefix = None if prefix is None else _like(dbias[:, :before].transpose(1, 2), prefix)
    return _like(dgrid, grid), _like(drows, by_row), _like(dcolumns, by_column), dprefix


def _like(grad: Tensor, table: Tensor) -> Tensor:
    return table.new_empty(table.shape).copy_(grad)


def _taps(size: int, count: int, like: Tensor) -> Tensor:
    """Shares that ``count`` entries have in ``size`` positions, ``(size, count)``: as the kernels' `_between`."""
    at = (torch.arange(size, device=like.device) + 0.5) * (count / size) - 0.5
    distance = at.clamp(0, count - 1)[:, None] - torch.arange(count, device=like.device)
    return (1 - distance.abs()).clamp(min=0).to(like.dtype)


@triton.jit
def _between(i, size, count):
    """The two of ``count`` entries that position ``i`` of ``size`` lies between, and the share of the second."""
    at = tl.maximum((i.to(tl.float32) + 0.5) * (count / size) - 0.5, 0.0)
    low = tl.minimum(at.to(tl.int32), count - 1)
    return low, tl.minimum(low + 1, count - 1), at - low.to(tl.float32)


@triton.jit
def _entry(table, i, size, count, mask):
    """A position of a table that is resized from ``count`` to ``size``."""
    low, high, share = _between(i, size, count)
    first = tl.load(table + low, mask=mask, other=0.0).to(tl.float32)
    return first + share * (tl.load(table + high, mask=mask, other=0.0).to(tl.float32) - first)


@triton.jit
def _resize(
    grid, by_row, by_column, prefix, tables,
    a, P, H, W, grid_h, grid_w, rows_size, columns_size, log2e,
    BLOCK_R: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    R = H * grid_w + W + P
    parts = tl.cdiv(a, BLOCK_A)
    blocks = tl.cdiv(R, BLOCK_R)
    head = tl.program_id(0) // parts // blocks
    r = (tl.program_id(0) // parts % blocks * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    agent = (tl.program_id(0) % parts * BLOCK_A + tl.arange(0, BLOCK_A))[None, :]
    valid = (r < R) & (agent < a)
    agent += head * a

    on_grid = valid & (r < H * grid_w)
    i, x = r // grid_w, r % grid_w
    low, high, share = _between(i, H, grid_h)
    grid += agent * (grid_h * grid_w) + x
    first = tl.load(grid + low * grid_w, mask=on_grid, other=0.0).to(tl.float32)
    value = first + share * (tl.load(grid + high * grid_w, mask=on_grid, other=0.0).to(tl.float32) - first)
    value += _entry(by_row + agent * rows_size, i, H, rows_size, on_grid)
    j = r - H * grid_w
    value += _entry(by_column + agent * columns_size, j, W, columns_size, valid & (j >= 0) & (j < W))
    before = valid & (j >= W)
    value += tl.load(prefix + agent * P + (j - W), mask=before, other=0.0).to(tl.float32)
    tl.store(tables + head.to(tl.int64) * R * a + r * a + (agent - head * a), value * log2e, mask=valid)


@triton.jit
def interpolate(tables, n, agent, valid, head, a, P, H, W, grid_w):
    """Bias between tokens ``n`` and agents, two axes to be broadcast."""
    tables += head * (H * grid_w + W + P) * a
    token = n - P
    row, column = token // W, token % W
    low, high, share = _between(column, W, grid_w)
    on_map = valid & (token >= 0)
    first = tl.load(tables + (row * grid_w + low) * a + agent, mask=on_map, other=0.0)
    second = tl.load(tables + (row * grid_w + high) * a + agent, mask=on_map, other=0.0)
    rest = H * grid_w + tl.where(token >= 0, column, W + n)
    return first + share * (second - first) + tl.load(tables + rest * a + agent, mask=valid, other=0.0)
