"""BiFormer's bi-level routing attention, and the full attention of its last stage."""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from visionattn.layers.channels_last import depthwise
from visionattn.layers.padding import lacking
from visionattn.ops import Impl, routed_attention, topk_regions


class RoutingAttention(nn.Module):
    """Bi-level routing attention on a map, with a depthwise convolution of the values (LePE) added.

    ``(B, H, W, C)`` to ``(B, H, W, C)`` at any size. What the authors' two implementations do with a map that does not
    divide into regions differs, and weights of one are not weights of the other:

    - ``padding="input"``: ``n_win x n_win`` regions. The input is zero-padded at the bottom and right before the
      projection, so that padded tokens are keys that equal the bias, and count in the routing.
    - ``padding="qkv"``: regions of ``H // n_win x W // n_win`` tokens (one at least), as many as cover the map.
      Queries, keys and values are zero-padded after the projection; padded tokens are keys of logit 0 that do not
      count in the routing.

    Args:
        dim: Channels.
        num_heads: Heads; ``dim`` must be a multiple.
        n_win: Regions along each side.
        topk: Regions that each region attends to; all, if there are fewer.
        padding: See above.
        impl: Implementation of `visionattn.ops.routed_attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        n_win: int = 7,
        topk: int = 4,
        padding: Literal["input", "qkv"] = "input",
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        if n_win < 1 or topk < 1:
            raise ValueError(f"n_win and topk must be at least 1, got {n_win} and {topk}")
        if padding not in ("input", "qkv"):
            raise ValueError(f"padding must be 'input' or 'qkv', got {padding!r}")
        self.num_heads, self.n_win, self.topk, self.padding, self.impl = num_heads, n_win, topk, padding, impl
        self.scale = dim**-0.5  # of the full width, not the head's: the published weights were trained so
        self.qkv = nn.Linear(dim, 3 * dim)
        self.lepe = depthwise(dim, 5)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        qkv, lepe, grid = self._project(x)
        q, k, v = self._heads(qkv)
        index = self._route(q, k, grid, (H, W))
        y = routed_attention(q, k, v, index, grid=grid, scale=self.scale, impl=self.impl)  # (B, h, H', W', d)
        y = y.permute(0, 2, 3, 1, 4).flatten(3)  # (B, H', W', C)
        if self.padding == "qkv":
            y = y[:, :H, :W]
        return self.proj(y + lepe)[:, :H, :W]

    def route(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the regions ``(B, P, topk)`` that each region of ``x (B, H, W, C)`` attends to, and the grid."""
        qkv, _, grid = self._project(x)
        q, k, _ = self._heads(qkv)
        return self._route(q, k, grid, (x.shape[1], x.shape[2])), grid

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Return q, k and v ``(B, H', W', 3C)`` on the padded map, the convolved values, and the grid."""
        H, W = x.shape[1:3]
        n = self.n_win
        if self.padding == "input":
            qkv = self.qkv(F.pad(x, (0, 0, 0, lacking(W, n), 0, lacking(H, n))))
            return qkv, self.lepe(qkv.chunk(3, dim=-1)[2]), (n, n)
        h, w = max(1, H // n), max(1, W // n)
        qkv = self.qkv(x)
        lepe = self.lepe(qkv.chunk(3, dim=-1)[2])
        return F.pad(qkv, (0, 0, 0, lacking(W, w), 0, lacking(H, h))), lepe, ((H + h - 1) // h, (W + w - 1) // w)

    def _route(self, q: Tensor, k: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        return topk_regions(q, k, grid=grid, topk=self.topk, valid=size if self.padding == "qkv" else None)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, H, W, _ = qkv.shape
        q, k, v = qkv.view(B, H, W, 3, self.num_heads, -1).permute(3, 0, 4, 1, 2, 5)  # 3 x (B, h, H, W, d)
        return q, k, v


class LePEAttention(nn.Module):
    """Full attention on a map, with a depthwise convolution added. ``(B, H, W, C)`` to ``(B, H, W, C)``.

    Args:
        dim: Channels.
        num_heads: Heads; ``dim`` must be a multiple.
        lepe_on: What the convolution sees: the attention's input or its values.
    """

    def __init__(self, dim: int, *, num_heads: int = 8, lepe_on: Literal["input", "values"] = "input") -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads, self.lepe_on = num_heads, lepe_on
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.lepe = depthwise(dim, 5)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        qkv = self.qkv(x)
        lepe = self.lepe(x if self.lepe_on == "input" else qkv.chunk(3, dim=-1)[2])
        q, k, v = qkv.view(B, H * W, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # 3 x (B, h, N, d)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H, W, C)
        return self.proj(y + lepe)
