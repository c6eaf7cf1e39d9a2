"""TransNeXt's aggregated attention, and the full cosine attention of its last stage."""

import math

import torch
from timm.layers import LayerNorm, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from visionattn.layers.channels_last import ConvNHWC
from visionattn.layers.log_position_bias import LogPositionBias, Size
from visionattn.ops import Impl, aggregated_attention
from visionattn.ops._dispatch import exporting, open_size


class _CosineAttention(nn.Module):
    """What both attentions share: cosine logits with a query embedding, a temperature and a position bias."""

    def __init__(self, dim: int, num_heads: int, pretrain_side: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        start = math.log(math.exp(1 / 0.24) - 1)  # softplus of it is 1 / 0.24
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), start))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, dim // num_heads))
        trunc_normal_(self.query_embedding, std=0.02)
        self.cpb = LogPositionBias(num_heads, pretrain_side=pretrain_side)

    def pooled_size(self, size: Size) -> Size:
        """Size of the map of keys for a map of ``size``."""
        return size

    def set_bias_size(self, size: Size | None) -> None:
        """Make the position bias for maps of ``size`` and resize it for others; None makes it for every size."""
        self.cpb.bias_size = None if size is None else (size, self.pooled_size(size))

    def scaled(self, q: Tensor, length_scale: Tensor | float) -> Tensor:
        """Queries as the logits need them: ``(B, heads, N, d)``."""
        return (q + self.query_embedding) * (F.softplus(self.temperature) * length_scale)


class AggregatedAttention(_CosineAttention):
    """Aggregated attention on a map: a 3x3 window and a pooled map in one softmax. ``(B, H, W, C)`` to the same.

    Args:
        dim: Channels.
        num_heads: Heads; ``dim`` must be a multiple.
        sr_ratio: The pooled map has ``H // sr_ratio x W // sr_ratio`` tokens (one at least).
        fixed_pool_size: Side of the pooled map instead ("linear inference mode"), of the map's own side at most.
        window: Side of the window, odd.
        pretrain_side: Side of this stage's map when the weights were trained.
        impl: Implementation of `visionattn.ops.aggregated_attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        sr_ratio: int,
        fixed_pool_size: int | None = None,
        window: int = 3,
        pretrain_side: int = 56,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(dim, num_heads, pretrain_side)
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window must be odd, got {window}")
        if sr_ratio < 1 or (fixed_pool_size is not None and fixed_pool_size < 1):
            raise ValueError(f"sr_ratio and fixed_pool_size must be at least 1, got {sr_ratio} and {fixed_pool_size}")
        self.sr_ratio, self.fixed_pool_size, self.window, self.impl = sr_ratio, fixed_pool_size, window, impl
        cells = window**2
        self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, cells))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, dim // num_heads, cells))
        self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, cells))
        trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        trunc_normal_(self.learnable_tokens, std=0.02)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.sr = ConvNHWC(dim, dim, 1)
        self.norm = LayerNorm(dim, eps=1e-5)
        self.proj = nn.Linear(dim, dim)

    def pooled_size(self, size: Size) -> Size:
        p = self.fixed_pool_size
        H, W = size
        return (min(p, H), min(p, W)) if p else (max(1, H // self.sr_ratio), max(1, W // self.sr_ratio))

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        h, pooled = self.num_heads, self.pooled_size((H, W))
        q = F.normalize(self.q(x).view(B, H * W, h, -1), dim=-1).transpose(1, 2)  # (B, h, N, d)
        k, v = self._keys_and_values(x.flatten(1, 2))  # (B, h, N, d)
        k_pool, v_pool = self._keys_and_values(self._pool(x, pooled))  # (B, h, P, d)
        extra = q.to(v.dtype) @ self.learnable_tokens + self.learnable_bias  # (B, h, N, cells)
        tensors = (
            *(y.unflatten(2, (H, W)) for y in (self.scaled(q, self._length_scale(H, W, pooled, x)), k, v)),
            k_pool,
            v_pool,
            self.relative_pos_bias_local,
            self.cpb((H, W), pooled),
            extra.unflatten(2, (H, W)),
        )
        y = aggregated_attention(*(t.to(v.dtype) for t in tensors), impl=self.impl)  # (B, h, H, W, d)
        return self.proj(y.permute(0, 2, 3, 1, 4).reshape(B, H, W, C))

    def _keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Unit keys, and values: ``(B, N, C)`` to ``(B, h, N, d)`` each."""
        B, N, _ = x.shape
        k, v = self.kv(x).view(B, N, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return F.normalize(k, dim=-1), v

    def _pool(self, x: Tensor, size: Size) -> Tensor:
        x = F.gelu(self.sr(x)).permute(0, 3, 1, 2)
        return self.norm(F.adaptive_avg_pool2d(x, size).flatten(2).transpose(1, 2))  # (B, P, C)

    def _length_scale(self, H: int, W: int, pooled: Size, like: Tensor) -> Tensor:
        """Logarithm of the number of keys of each token: ``(N, 1)``."""
        r = self.window // 2

        def cells(n: int) -> Tensor:
            at = torch.arange(n, device=like.device)
            return at.clamp(max=r) + (n - 1 - at).clamp(max=r) + 1

        keys = (cells(H)[:, None] * cells(W)).flatten() + pooled[0] * pooled[1]
        return keys.to(self.temperature.dtype).log()[:, None]


class FullCosineAttention(_CosineAttention):
    """Full attention with cosine logits and log-spaced position bias. ``(B, H, W, C)`` to ``(B, H, W, C)``.

    Args:
        dim: Channels.
        num_heads: Heads; ``dim`` must be a multiple.
        pretrain_side: Side of this stage's map when the weights were trained.
    """

    def __init__(self, dim: int, *, num_heads: int, pretrain_side: int = 7) -> None:
        super().__init__(dim, num_heads, pretrain_side)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        q, k, v = self.qkv(x).view(B, H * W, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # 3 x (B, h, N, d)
        length_scale = x.new_full((), H * W).log() if open_size(H, W) else math.log(H * W)
        q, k = self.scaled(F.normalize(q, dim=-1), length_scale), F.normalize(k, dim=-1)
        bias = self.cpb((H, W), (H, W)).contiguous()
        q, k, bias = (y.to(v.dtype) for y in (q, k, bias[None]))
        if exporting():  # the layout of the fused result with a bias is not the one that exporters decompose it to
            y = (q @ k.transpose(-2, -1) + bias).softmax(dim=-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.proj(y.transpose(1, 2).reshape(B, H, W, C))
