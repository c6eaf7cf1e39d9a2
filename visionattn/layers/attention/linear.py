"""MALA's attention: magnitude-aware linear or softmax, with rotary positions, LePE and an output gate."""

from typing import Literal

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn
from torch.nn import functional as F

from visionattn.layers.channels_last import depthwise
from visionattn.ops import Impl, linear_attention


class MagnitudeAwareAttention(nn.Module):
    """Attention on a map, gated: ``proj((attention + lepe(v)) * o)``. ``(B, H, W, C)`` to ``(B, H, W, C)``, any size.

    Args:
        dim: Channels.
        num_heads: Heads; ``dim`` must be a multiple of four times that, for positions rotate pairs along two axes.
        kind: ``"linear"`` is `visionattn.ops.linear_attention` with magnitude-aware normalisation on ``elu(x) + 1``;
            ``"softmax"`` is softmax attention on rotated queries and keys.
        impl: Implementation of `visionattn.ops.linear_attention`.
    """

    def __init__(
        self, dim: int, *, num_heads: int, kind: Literal["linear", "softmax"] = "linear", impl: Impl = "auto"
    ) -> None:
        super().__init__()
        if dim % (4 * num_heads):
            raise ValueError(f"dim must be a multiple of 4 * num_heads, got {dim} and {num_heads}")
        if kind not in ("linear", "softmax"):
            raise ValueError(f"kind must be 'linear' or 'softmax', got {kind!r}")
        self.num_heads, self.kind, self.impl = num_heads, kind, impl
        self.qkvo = nn.Linear(dim, 4 * dim)
        self.lepe = depthwise(dim, 5)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        qkvo = self.qkvo(x)
        v_map, gate = qkvo[..., 2 * C : 3 * C], qkvo[..., 3 * C :]
        q, k, v, _ = qkvo.view(B, H * W, 4, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, h, N, d)
        cos, sin = axial_rotation(H, W, C // self.num_heads, x)
        if self.kind == "linear":
            q, k = elu_plus_one(q), elu_plus_one(k)
            y = linear_attention(q, k, v, normalization="magnitude_aware", rope=(cos, sin), impl=self.impl)
        else:
            table = torch.cat([sin, cos], dim=-1).repeat_interleave(2, dim=-1).to(q.dtype)  # (N, 2 * d), as timm's
            y = F.scaled_dot_product_attention(apply_rot_embed_cat(q, table), apply_rot_embed_cat(k, table), v)
        y = y.transpose(1, 2).reshape(B, H, W, C)
        return self.proj((y + self.lepe(v_map)) * gate)


def elu_plus_one(x: Tensor) -> Tensor:
    """The positive feature map ``elu(x) + 1``, in fp32 at least: in half precision the sum loses small features."""
    return F.elu(x.to(torch.promote_types(x.dtype, torch.float32))).add_(1).to(x.dtype)


def axial_rotation(H: int, W: int, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ``(H * W, head_dim / 2)`` of MALA's rotary positions, on the device of ``like``.

    Pairs of channels of the first half turn with the row, of the second half with the column, counted from 0, at
    frequencies ``10000 ** -linspace(0, 1)``: unlike the usual ones these include the end.
    """
    exact = torch.promote_types(like.dtype, torch.float32)
    angle = 10000 ** -torch.linspace(0, 1, head_dim // 4, device=like.device)
    rows, cols = (torch.arange(n, device=like.device)[:, None] * angle for n in (H, W))  # (n, d / 4)

    def spread(by_row: Tensor, by_col: Tensor) -> Tensor:
        both = [by_row[:, None].expand(-1, W, -1), by_col[None].expand(H, -1, -1)]
        return torch.cat(both, dim=-1).flatten(0, 1).to(exact)  # (N, d / 2)

    return spread(rows.cos(), cols.cos()), spread(rows.sin(), cols.sin())
