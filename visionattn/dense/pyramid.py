"""The simple feature pyramid of plain vision transformers: strides 4 to 32 from one map.

Paper: Li et al., "Exploring plain vision transformer backbones for object detection", arXiv:2203.16527, section 3.
"""

from collections.abc import Sequence

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from visionattn.dense.errors import BackboneError


class SimplePyramid(nn.Module):
    """Transposed convolutions and pooling bring one map to each stride; two convolutions to one width.

    Args:
        dim: Channels of the map.
        channels: Channels of the outputs.
        stride: Stride of the map.
        strides: Strides of the outputs.

    Raises:
        BackboneError: the strides are not a power of two apart.
    """

    def __init__(self, dim: int, channels: int, stride: int, strides: Sequence[int]) -> None:
        super().__init__()
        if stride & (stride - 1):
            raise BackboneError(f"patches of {stride} pixels have no pyramid of strides 4, 8, 16 and 32: use 4 to 32")
        self.levels = nn.ModuleList(_level(dim, channels, stride, out) for out in strides)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return a map ``(B, channels, H * stride / s, W * stride / s)`` for each of the strides s."""
        return tuple(level(x) for level in self.levels)


def _level(dim: int, channels: int, stride: int, out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    while stride > out:
        layers.append(nn.ConvTranspose2d(dim, dim // 2, 2, stride=2))
        dim, stride = dim // 2, stride // 2
        if stride > out:
            layers += [LayerNorm2d(dim, eps=1e-6), nn.GELU()]
    if stride < out:
        layers.append(nn.MaxPool2d(out // stride, ceil_mode=True))
    layers += [nn.Conv2d(dim, channels, 1, bias=False), LayerNorm2d(channels, eps=1e-6)]
    layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), LayerNorm2d(channels, eps=1e-6)]
    return nn.Sequential(*layers)
