"""Gated MLP whose gate sees the neighbours."""

from torch import Tensor, nn
from torch.nn import functional as F

from visionattn.layers.channels_last import depthwise


class ConvGLU(nn.Module):
    """Convolutional gated linear unit (TransNeXt, arXiv:2311.17132). ``(B, H, W, C)`` to ``(B, H, W, C)``.

    One half of the hidden channels, through a depthwise 3x3 convolution and GELU, gates the other half.

    Args:
        dim: Channels.
        hidden_dim: Width of an ordinary MLP; two thirds of it, twice, cost the same.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        hidden_dim = int(2 * hidden_dim / 3)
        self.fc1 = nn.Linear(dim, 2 * hidden_dim)
        self.dwconv = depthwise(hidden_dim, 3)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, x = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.gelu(self.dwconv(gate)) * x)
