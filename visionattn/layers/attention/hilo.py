"""LITv2's HiLo attention: some heads see small windows, the others an averaged map."""

from torch import Tensor, cat, nn
from torch.nn import functional as F

from visionattn.layers.padding import pad_to_windows
from visionattn.ops import Impl, window_attention


class HiLoAttention(nn.Module):
    """Two groups of heads side by side, each with its own projections. ``(B, H, W, C)`` to ``(B, H, W, C)``.

    High frequencies: attention inside windows of ``window`` x ``window`` tokens. Low frequencies: all tokens attend to
    the means of those windows. A map that does not divide into windows is zero-padded at the bottom and right, and
    padded tokens are keys (as in the authors' detection code; their classifier takes no such map).

    Args:
        dim: Channels.
        num_heads: Heads; ``dim`` must be a multiple.
        window: Side of a window; 1 makes all heads low-frequency, which then is plain attention.
        alpha: Share of low-frequency heads, rounded down.
        qkv_bias: Whether queries, keys and values have a bias.
        impl: Implementation of `visionattn.ops.window_attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        window: int = 2,
        alpha: float = 0.5,
        qkv_bias: bool = True,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        if window < 1 or not 0 <= alpha <= 1:
            raise ValueError(f"window must be at least 1 and alpha in [0, 1], got {window} and {alpha}")
        self.head_dim, self.window, self.impl = dim // num_heads, window, impl
        self.l_heads = num_heads if window == 1 else int(num_heads * alpha)
        self.h_heads = num_heads - self.l_heads
        l_dim, h_dim = self.l_heads * self.head_dim, self.h_heads * self.head_dim
        if self.h_heads:
            self.h_qkv = nn.Linear(dim, 3 * h_dim, bias=qkv_bias)
            self.h_proj = nn.Linear(h_dim, h_dim)
        if self.l_heads:
            self.l_q = nn.Linear(dim, l_dim, bias=qkv_bias)
            self.l_kv = nn.Linear(dim, 2 * l_dim, bias=qkv_bias)
            self.l_proj = nn.Linear(l_dim, l_dim)

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        s = self.window
        padded = pad_to_windows(x, s, s)
        if not self.l_heads:
            return self._high(padded)[:, :H, :W]
        low = self._low(x, padded)
        return cat([self._high(padded)[:, :H, :W], low], dim=-1) if self.h_heads else low

    def _high(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        qkv = self.h_qkv(x).view(B, H, W, 3, self.h_heads, self.head_dim)
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)  # 3 x (B, h, H, W, d)
        y = window_attention(q, k, v, window=self.window, impl=self.impl)
        return self.h_proj(y.permute(0, 2, 3, 1, 4).flatten(3))

    def _low(self, x: Tensor, padded: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        q = self.l_q(x).view(B, H * W, self.l_heads, self.head_dim).transpose(1, 2)  # (B, h, N, d)
        means = (
            padded if self.window == 1 else F.avg_pool2d(padded.permute(0, 3, 1, 2), self.window).permute(0, 2, 3, 1)
        )
        k, v = self.l_kv(means).view(B, -1, 2, self.l_heads, self.head_dim).permute(2, 0, 3, 1, 4)  # 2 x (B, h, M, d)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.l_proj(y.transpose(1, 2).reshape(B, H, W, -1))
