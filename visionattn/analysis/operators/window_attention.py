"""Window attention: Swin-T's blocks, plain and shifted, and the windows of HiLo, at 224 and at 800 x 1280."""

import torch
from torch import Tensor

from visionattn.analysis import flex
from visionattn.analysis.bench import Case
from visionattn.ops import window_attention
from visionattn.testing import randn

DIM = 32  # of a head
SHAPES = {  # heads, map, window, shift, whether biased
    "Swin-T stage 1 at 224": (3, (56, 56), 7, 0, True),
    "Swin-T stage 1 at 224, shifted": (3, (56, 56), 7, 3, True),
    "Swin-T stage 3 at 224, shifted": (12, (14, 14), 7, 3, True),
    "LITv2-S stage 3 at 224": (2, (14, 14), 2, 0, False),
    "Swin-T stage 1 at 800x1280": (3, (203, 322), 7, 0, True),
    "Swin-T stage 1 at 800x1280, shifted": (3, (203, 322), 7, 3, True),
    "LITv2-S stage 3 at 800x1280": (2, (50, 80), 2, 0, False),
    "LITv2-S stage 3 at 800x1280, windows of 4": (2, (52, 80), 4, 0, False),
}


def cases() -> list[Case]:
    """Return one case a stage and image size."""
    return [_case(shape, *numbers) for shape, numbers in SHAPES.items()]


def _case(shape: str, heads: int, size: tuple[int, int], window: int, shift: int, biased: bool) -> Case:
    n = window**2

    def inputs() -> list[Tensor]:
        qkv = randn(1, *size, 3, heads, DIM).permute(3, 0, 4, 1, 2, 5)  # as a joint projection leaves them
        return [*qkv, *([randn(heads, n, n, seed=1)] if biased else [])]

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return window_attention(q, k, v, window=window, shift=shift, bias=bias)

    mask = shift_mask(size, window, shift) if shift else None

    def published(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return partition_formulation(q, k, v, bias, mask, window, shift)

    others = {"FlexAttention": flex.window(size, window, shift, biased=biased)}
    return Case("window_attention", shape, inputs, run, published, unbatched=(3,), gpu_others=others)


def shift_mask(size: tuple[int, int], window: int, shift: int) -> Tensor:
    """Swin's mask, made once: -100 between tokens of different regions, ``(P, n, n)``."""
    H, W = size
    rows, cols = (torch.bucketize(torch.arange(s), torch.tensor([s - window, s - shift]), right=True) for s in (H, W))
    region = (3 * rows[:, None] + cols).view(H // window, window, W // window, window)
    region = region.transpose(1, 2).reshape(-1, window**2)
    return (region[:, None] != region[:, :, None]) * -100.0


def partition_formulation(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, window: int, shift: int
) -> Tensor:
    """Swin's steps: roll, cut into windows, attention with bias and mask, join, roll back."""
    B, heads, H, W, d = q.shape
    n = window**2

    def cut(t: Tensor) -> Tensor:  # (B * P, heads, n, d)
        t = t.permute(0, 2, 3, 1, 4)
        if shift:
            t = t.roll((-shift, -shift), dims=(1, 2))
        t = t.reshape(B, H // window, window, W // window, window, heads, d).transpose(2, 3)
        return t.reshape(-1, n, heads, d).transpose(1, 2)

    q, k, v = cut(q), cut(k), cut(v)
    logits = (q * d**-0.5) @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = (logits.view(B, -1, heads, n, n) + mask[:, None]).view(-1, heads, n, n)
    y = (logits.softmax(dim=-1) @ v).transpose(1, 2)
    y = y.reshape(B, H // window, W // window, window, window, heads, d).transpose(2, 3).reshape(B, H, W, heads, d)
    return (y.roll((shift, shift), dims=(1, 2)) if shift else y).permute(0, 3, 1, 2, 4)
