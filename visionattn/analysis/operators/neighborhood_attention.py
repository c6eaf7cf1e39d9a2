"""Neighbourhood attention of NAT-Mini and DiNAT-Mini: the stage shapes at 224 and, as in detection, at 800 x 1344.

Two more without the relative bias, which is all that NATTEN takes.
"""

import torch
from torch import Tensor

from visionattn.analysis import flex
from visionattn.analysis.bench import Case
from visionattn.ops import neighborhood_attention
from visionattn.testing import randn

DIM = 32  # of a head
KERNEL = 7
NO_BIAS = ", no bias"
SHAPES = {  # heads, map, dilation
    "NAT stage 1 at 224": (2, (56, 56), 1),
    "NAT stage 2 at 224": (4, (28, 28), 1),
    "NAT stage 3 at 224": (8, (14, 14), 1),
    "NAT stage 4 at 224": (16, (7, 7), 1),
    "DiNAT stage 1 at 224": (2, (56, 56), 8),
    "DiNAT stage 2 at 224": (4, (28, 28), 4),
    "DiNAT stage 3 at 224": (8, (14, 14), 2),
    "NAT stage 1 at 800x1344": (2, (200, 336), 1),
    "NAT stage 2 at 800x1344": (4, (100, 168), 1),
    "NAT stage 3 at 800x1344": (8, (50, 84), 1),
    "NAT stage 4 at 800x1344": (16, (25, 42), 1),
    "DiNAT stage 1 at 800x1344": (2, (200, 336), 28),
    "DiNAT stage 2 at 800x1344": (4, (100, 168), 14),
    "DiNAT stage 3 at 800x1344": (8, (50, 84), 7),
    f"NAT stage 1 at 224{NO_BIAS}": (2, (56, 56), 1),
    f"DiNAT stage 2 at 800x1344{NO_BIAS}": (4, (100, 168), 14),
}


def cases() -> list[Case]:
    """Return one case a stage, dilation and image size."""
    return [_case(shape, *numbers) for shape, numbers in SHAPES.items()]


def _case(shape: str, heads: int, size: tuple[int, int], dilation: int) -> Case:
    def inputs() -> list[Tensor]:
        q, k, v = (randn(1, heads, *size, DIM, seed=i) for i in range(3))
        table = randn(heads, 2 * KERNEL - 1, 2 * KERNEL - 1, seed=3)
        return [q, k, v] if shape.endswith(NO_BIAS) else [q, k, v, table]

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return neighborhood_attention(q, k, v, bias, kernel_size=KERNEL, dilation=dilation)

    def published(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return gather_formulation(q, k, v, bias, KERNEL, dilation)

    others = {"FlexAttention": flex.neighborhood_windows(size, KERNEL, dilation)}
    return Case("neighborhood_attention", shape, inputs, run, published, unbatched=(3,), gpu_others=others)


def gather_formulation(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel_size: int, dilation: int) -> Tensor:
    """The papers' definition in PyTorch alone, K and V gathered for every query, as (B, h, H, W, K, K, d)."""
    rows, row_bias = _window(q.shape[2], kernel_size, dilation, q.device)  # (H, K)
    cols, col_bias = _window(q.shape[3], kernel_size, dilation, q.device)  # (W, K)
    rows, cols = rows[:, None, :, None], cols[None, :, None, :]
    k, v = (x[:, :, rows, cols].flatten(4, 5) for x in (k, v))  # (B, h, H, W, K * K, d)
    logits = (k @ (q * q.shape[-1] ** -0.5)[..., None])[..., 0]
    if bias is not None:
        logits = logits + bias[:, row_bias[:, None, :, None], col_bias[None, :, None, :]].flatten(3)
    return (logits.softmax(dim=-1)[..., None, :] @ v)[..., 0, :]


def _window(length: int, kernel_size: int, dilation: int, device: torch.device) -> tuple[Tensor, Tensor]:
    keys, offsets = torch.zeros(2, length, kernel_size, dtype=torch.int64)
    for i in range(length):
        column = torch.arange(i % dilation, length, dilation)  # all tokens of the same class
        start = min(max(i // dilation - kernel_size // 2, 0), len(column) - kernel_size)
        keys[i] = column[start : start + kernel_size]
        offsets[i] = start + torch.arange(kernel_size) - i // dilation + kernel_size - 1
    return keys.to(device), offsets.to(device)
