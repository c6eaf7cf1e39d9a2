"""Linear attention on plain tokens, for models whose softmax attention is swapped."""

from torch import Tensor, nn

from visionattn.layers.attention.linear import elu_plus_one
from visionattn.ops import Impl, linear_attention
from visionattn.ops.linear_attention.api import Normalization


class TokenLinearAttention(nn.Module):
    """Linear self-attention of tokens ``(B, N, C)``: time and memory linear in the tokens.

    Args:
        dim: Channels.
        num_heads: Heads; ``dim`` must be a multiple.
        normalization: Of `visionattn.ops.linear_attention`. ``"injective"`` works on plain queries and keys, the others
            on ``elu(x) + 1`` of them.
        impl: Implementation of the operator.
    """

    def __init__(
        self, dim: int, *, num_heads: int, normalization: Normalization = "injective", impl: Impl = "auto"
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads, self.normalization, self.impl = num_heads, normalization, impl
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Attend; ``size``, which hosts of tokens hand to every mixer, has no bearing."""
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        if self.normalization != "injective":
            q, k = elu_plus_one(q), elu_plus_one(k)
        y = linear_attention(q, k, v, normalization=self.normalization, impl=self.impl)
        return self.proj(y.transpose(1, 2).reshape(B, N, C))
