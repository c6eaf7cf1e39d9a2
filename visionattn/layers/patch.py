"""Blocks between the stages of a hierarchical backbone, on NHWC maps."""

from timm.layers import LayerNorm
from torch import Tensor, nn
from torch.nn import functional as F


class PatchMerging(nn.Module):
    """Swin's downsampling: ``(B, H, W, C)`` to ``(B, ceil(H / 2), ceil(W / 2), out_dim)``.

    The four tokens of each 2 x 2 patch are concatenated in the order (0, 0), (1, 0), (0, 1), (1, 1) of (row, column),
    normed and projected. A map of odd height or width is zero-padded at the bottom or right first.

    Args:
        dim: Channels.
        out_dim: Channels of the output; ``2 * dim`` if None.
        eps: Of the norm.
    """

    def __init__(self, dim: int, out_dim: int | None = None, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = LayerNorm(4 * dim, eps=eps)
        self.reduction = nn.Linear(4 * dim, 2 * dim if out_dim is None else out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        if H % 2 or W % 2:
            x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        B, H, W, C = x.shape
        x = x.reshape(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5).flatten(3)  # (B, H / 2, W / 2, 4 C)
        return self.reduction(self.norm(x))
