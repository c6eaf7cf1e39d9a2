"""Agent attention at the stages of Agent-PVT-S (224, and 800 x 1344 with the authors' larger grids) and of DeiT-S."""

from torch import Tensor
from torch.nn import functional as F

from visionattn.analysis.bench import Case
from visionattn.ops import AgentBias, agent_attention
from visionattn.testing import randn

DIM = 64  # of a head
SHAPES = {  # batch, heads, map, agents, prefix tokens
    "PVT stage 1 at 224": (1, 1, (56, 56), 9, 0),
    "PVT stage 2 at 224": (1, 2, (28, 28), 16, 0),
    "PVT stage 3 at 224": (1, 5, (14, 14), 49, 0),
    "PVT stage 4 at 224": (1, 8, (7, 7), 49, 0),
    "DeiT-S at 224": (1, 6, (14, 14), 49, 1),
    "PVT stage 1 at 800x1344": (1, 1, (200, 336), 144, 0),
    "PVT stage 3 at 800x1344": (1, 5, (50, 84), 784, 0),
}


def cases() -> list[Case]:
    """Return one case a stage and image size."""
    return [_case(shape, *numbers) for shape, numbers in SHAPES.items()]


def _case(shape: str, batch: int, heads: int, size: tuple[int, int], agents: int, prefix: int) -> Case:
    N = prefix + size[0] * size[1]
    tables = [(7, 7), (size[0],), (size[1],), *([(prefix,)] if prefix else [])]

    def inputs() -> list[Tensor]:
        tokens = [randn(batch, heads, n, DIM, seed=i) for i, n in enumerate((N, N, N, agents))]
        return [*tokens, *(randn(heads, agents, *t, seed=4 + i) for i, t in enumerate(tables * 2))]

    def run(q: Tensor, k: Tensor, v: Tensor, a: Tensor, *bias: Tensor) -> Tensor:
        key_bias, query_bias = AgentBias(*bias[: len(tables)]), AgentBias(*bias[len(tables) :])
        return agent_attention(q, k, v, a, size=size, key_bias=key_bias, query_bias=query_bias)

    def published(q: Tensor, k: Tensor, v: Tensor, a: Tensor, *bias: Tensor) -> Tensor:
        key_bias = _written_out(size, q.shape[0], *bias[: len(tables)])
        query_bias = _written_out(size, q.shape[0], *bias[len(tables) :]).transpose(-2, -1)
        values = ((a * DIM**-0.5) @ k.transpose(-2, -1) + key_bias).softmax(dim=-1) @ v
        return ((q * DIM**-0.5) @ a.transpose(-2, -1) + query_bias).softmax(dim=-1) @ values

    return Case("agent_attention", shape, inputs, run, published, unbatched=range(4, 4 + 2 * len(tables)))


def _written_out(
    size: tuple[int, int], batch: int, grid: Tensor, rows: Tensor, cols: Tensor, prefix: Tensor | None = None
) -> Tensor:
    """The paper's two bias maps, each repeated over the batch, then summed: ``(B, heads, a, N)``."""
    coarse = F.interpolate(grid, size=size, mode="bilinear").flatten(2).repeat(batch, 1, 1, 1)
    fine = (rows.unsqueeze(-1) + cols.unsqueeze(-2)).flatten(2).repeat(batch, 1, 1, 1)
    bias = coarse + fine
    if prefix is None:
        return bias
    return F.pad(bias, (prefix.shape[-1], 0)) + F.pad(prefix, (0, bias.shape[-1]))
