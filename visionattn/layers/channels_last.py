"""Convolution and batch norm on NHWC maps: PyTorch's own, fed a channels-last view, without a copy."""

from torch import Tensor, nn


class ToNHWC(nn.Module):
    """``(B, C, H, W)`` to contiguous ``(B, H, W, C)``; free for a channels-last tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).contiguous()


class ConvNHWC(nn.Conv2d):
    """`torch.nn.Conv2d` on ``(B, H, W, C)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class BatchNormNHWC(nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` on ``(B, H, W, C)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def depthwise(dim: int, kernel_size: int, bias: bool = True) -> ConvNHWC:
    """Return a depthwise convolution of odd ``kernel_size`` on ``(B, H, W, dim)`` that keeps the size."""
    return ConvNHWC(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=bias)
