"""Deformable convolution between stages."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from visionattn.ops._dispatch import exporting


class DeformablePatchMerging(nn.Module):
    """Deformable 2 x 2 convolution of stride 2, batch norm, GELU: ``(B, H, W, C)`` to ``(B, H // 2, W // 2, out_dim)``.

    Every tap reads the map at its own learned offset, bilinearly, zero outside (LITv2's deformable token merging;
    deformable convolution without modulation, arXiv:1703.06211). Offsets start at zero: a plain convolution.

    Args:
        dim: Channels.
        out_dim: Channels of the output.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 2, stride=2)
        self.offset = nn.Conv2d(dim, 8, 2, stride=2)  # (row, column) of each tap, row by row
        self.norm = nn.BatchNorm2d(out_dim)
        self.act = nn.GELU()
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        offset = self.offset(x)  # (B, 8, H // 2, W // 2)
        x = self.conv(_sample(x, offset)) if exporting() else _deform(x, offset, self.conv)
        return self.act(self.norm(x)).permute(0, 2, 3, 1)


def _deform(x: Tensor, offset: Tensor, conv: nn.Conv2d) -> Tensor:
    """Deformable convolution of stride 2, in fp32 at least: the operator knows no bf16, and offsets need the digits."""
    exact = torch.promote_types(x.dtype, torch.float32)
    bias = None if conv.bias is None else conv.bias.to(exact)
    return deform_conv2d(x.to(exact), offset.to(exact), conv.weight.to(exact), bias, stride=2).to(x.dtype)


def _sample(x: Tensor, offset: Tensor) -> Tensor:
    """Read what every tap reads, side by side: ``(B, C, H, W)`` to ``(B, C, 2 * (H // 2), 2 * (W // 2))``.

    This is what exporters can express of a deformable convolution; a plain one of stride 2 follows.
    """
    H, W = x.shape[2:]
    h, w = offset.shape[2:]
    taps = offset.unflatten(1, (2, 2, 2)).permute(0, 4, 1, 5, 2, 3)  # (B, h, 2, w, 2, 2): tap row and column, then axis
    taps = taps.flatten(3, 4).flatten(1, 2)  # (B, 2h, 2w, 2)
    row = taps[..., 0] + torch.arange(2 * h, device=x.device)[:, None]
    col = taps[..., 1] + torch.arange(2 * w, device=x.device)
    at = torch.stack([(2 * col + 1) / W - 1, (2 * row + 1) / H - 1], dim=-1)
    return F.grid_sample(x, at, mode="bilinear", padding_mode="zeros", align_corners=False)
