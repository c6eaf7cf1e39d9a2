"""Softmax attention over all tokens."""

from torch import Tensor, nn
from torch.nn import functional as F


class SoftmaxAttention(nn.Module):
    """Multi-head self-attention of tokens ``(B, N, C)`` or of a map ``(B, H, W, C)``; the shape is kept.

    Args:
        dim: Channels.
        num_heads: Heads; ``dim`` must be a multiple.
    """

    def __init__(self, dim: int, *, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Attend; ``size``, which hosts of tokens hand to every mixer, has no bearing."""
        B, C = x.shape[0], x.shape[-1]
        q, k, v = self.qkv(x).view(B, -1, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
