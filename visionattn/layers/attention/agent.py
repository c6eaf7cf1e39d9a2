"""Agent attention on a map, or on the tokens of a map behind a class token."""

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F

from visionattn.layers.channels_last import depthwise
from visionattn.layers.sized import Size, SizedTables
from visionattn.ops import AgentBias, Impl, agent_attention

GRID = (7, 7)  # of the tables that are resized to the map


class AgentBiasTables(SizedTables):
    """Learned bias between agents and tokens; see `visionattn.ops.agent_attention.AgentBias`.

    Args:
        num_heads: Heads.
        agents: Grid of agents.
        size: Map that the tables are for; other maps get resized tables.
        prefix_tokens: Tokens before the map.
    """

    def __init__(self, num_heads: int, agents: Size, size: Size, prefix_tokens: int = 0) -> None:
        super().__init__()
        h, a = num_heads, agents[0] * agents[1]
        self.agents = agents
        self.grid = nn.Parameter(torch.zeros(h, a, *GRID))
        self.rows = nn.Parameter(torch.zeros(h, a, size[0]))
        self.cols = nn.Parameter(torch.zeros(h, a, size[1]))
        self.prefix = nn.Parameter(torch.zeros(h, a, prefix_tokens)) if prefix_tokens else None
        for table in self.parameters():
            trunc_normal_(table, std=0.02)

    def forward(self, agents: Size) -> AgentBias:
        """Return the tables for a grid of ``agents``, resized (bilinear) if it is not the own one."""
        prefix = None if self.prefix is None else self._regrid(self.prefix, agents)
        return AgentBias(
            self._regrid(self.grid, agents), self._regrid(self.rows, agents), self._regrid(self.cols, agents), prefix
        )

    def table_shape(self, name: str, size: Size) -> tuple[int, ...]:
        """Rows and columns follow the map."""
        shape = tuple(getattr(self, name).shape)
        return {"rows": (*shape[:2], size[0]), "cols": (*shape[:2], size[1])}.get(name, shape)

    def resize(self, table: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Linear along the map; other differences are left as they are."""
        if table.ndim != 3 or table.shape[:2] != shape[:2]:
            return table
        return F.interpolate(table, size=shape[2], mode="linear", align_corners=False)

    def _regrid(self, x: Tensor, agents: Size) -> Tensor:
        if agents == self.agents:
            return x
        h, _, *rest = x.shape
        x = x.reshape(h, *self.agents, -1).permute(0, 3, 1, 2)  # (h, rest, rows of agents, columns of agents)
        x = F.interpolate(x, size=agents, mode="bilinear", align_corners=False)
        return x.permute(0, 2, 3, 1).reshape(h, agents[0] * agents[1], *rest)


class AgentAttention(nn.Module):
    """Attention through agents, the queries pooled to a grid, plus a depthwise convolution of the values.

    Takes a map ``(B, H, W, C)``, or with ``size`` tokens ``(B, P + H * W, C)``; returns the same shape. Prefix tokens
    are queries and keys like any other, but neither pooled to agents nor convolved.

    Args:
        dim: Channels.
        num_heads: Heads; ``dim`` must be a multiple.
        agents: Grid of agents that the bias tables are for, or its side.
        size: Map ``(H, W)`` that the bias tables are for. At other sizes they are resized, as in the authors' detection
            code.
        pool: Grid of agents to use; ``agents`` if None. The authors use more of them for detection.
        prefix_tokens: ``P``.
        impl: Implementation of `visionattn.ops.agent_attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        agents: int | Size,
        size: Size,
        pool: int | Size | None = None,
        prefix_tokens: int = 0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads, self.prefix_tokens, self.impl = num_heads, prefix_tokens, impl
        grid = _pair(agents)
        self.pool = grid if pool is None else _pair(pool)
        if min(*grid, *self.pool) < 1:
            raise ValueError(f"grids of agents must have at least one a side, got {grid} and {self.pool}")
        self.qkv = nn.Linear(dim, 3 * dim)
        self.key_bias = AgentBiasTables(num_heads, grid, size, prefix_tokens)
        self.query_bias = AgentBiasTables(num_heads, grid, size, prefix_tokens)
        self.dwc = depthwise(dim, 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        shape, (H, W) = x.shape, x.shape[1:3] if size is None else size
        B, P, heads = shape[0], self.prefix_tokens, (self.num_heads, -1)
        q, k, v = self.qkv(x).view(B, -1, 3 * shape[-1]).chunk(3, dim=-1)  # 3 x (B, P + H * W, C)
        q_map, v_map = ((t[:, P:] if P else t).unflatten(1, (H, W)) for t in (q, v))
        agents = pool_to_grid(q_map, self.pool).flatten(1, 2)  # (B, a, C)
        local = self.dwc(v_map).flatten(1, 2)
        q, k, v, agents = (t.unflatten(-1, heads).transpose(1, 2) for t in (q, k, v, agents))  # (B, h, tokens, d)
        y = agent_attention(
            q,
            k,
            v,
            agents,
            size=(H, W),
            key_bias=self.key_bias(self.pool),
            query_bias=self.query_bias(self.pool),
            impl=self.impl,
        )
        y = y.transpose(1, 2).flatten(2) + (F.pad(local, (0, 0, P, 0)) if P else local)
        return self.proj(y).view(shape)


def pool_to_grid(x: Tensor, grid: Size) -> Tensor:
    """Adaptive average pooling of ``(B, H, W, C)`` to ``(B, *grid, C)``, as two products that need no other layout."""
    B, H, W, C = x.shape
    if grid == (H, W):
        return x
    x = (_bins(W, grid[1], x) @ x.reshape(B * H, W, C)).view(B, H, grid[1] * C)
    return (_bins(H, grid[0], x) @ x).view(B, *grid, C)


def _bins(size: int, bins: int, like: Tensor) -> Tensor:
    """Means over spans from ``floor(i size / bins)`` to ``ceil((i + 1) size / bins)``: ``(bins, size)``."""
    i = torch.arange(bins, device=like.device).unsqueeze(1)
    j = torch.arange(size, device=like.device)
    inside = (j >= i * size // bins) & (j * bins < (i + 1) * size)
    return inside.to(like.dtype) / inside.sum(dim=1, keepdim=True).to(like.dtype)


def _pair(side: int | Size) -> Size:
    return (side, side) if isinstance(side, int) else (side[0], side[1])
