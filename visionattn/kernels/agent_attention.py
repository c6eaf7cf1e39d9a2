"""Agent attention in blocks: neither of its two matrices, nor a bias of the size of the map, is written out.

Forward: the position biases are resized along one axis and laid agents last, tables that grow with the sides of the map
alone; along the other axis kernels interpolate where they use them. Agents then gather from runs of tokens, each of
which gives a softmax of its own; the runs are combined in order. Queries spread what the agents hold. Each pass reads
its tokens once. Backward (`_agent_backward`): both softmaxes are recomputed from their statistics, first that of the
queries; each by tokens, by agents (runs of tokens, summed in order), and for the biases by position, over the whole
batch. The gradient of a bias is written at the size of the map, ``(h, N, a)``, and summed into its tables.

Letters: B batch, h heads, N tokens, a agents, d channels, dv channels of values. Logits are in units of log 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionattn.kernels import _agent_backward
from visionattn.kernels._agent_bias import Bias, interpolate, map_sizes, resized, to_tables
from visionattn.kernels._blocks import LOG2E, attention_configs, block, dot, load_rows, store_rows
from visionattn.kernels._launch import Config, launch
from visionattn.kernels._layout import heads_last, rows
from visionattn.kernels._softmax import load_stats, online_softmax, store_stats

PROGRAMS = 512  # that split work is meant to give, a few for each processor of a large GPU
RUN = 256  # tokens of a run at least


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    key_bias: Bias | None,
    query_bias: Bias | None,
    size: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend: ``(B, h, N, dv)``; for the backward pass, what the agents hold ``(B, h, a, dv)`` and the softmax
    statistics of agents ``(B, h, a, 2)`` and queries ``(B, h, N, 2)`` (`load_stats`), fp32.
    """
    q, k, v, agents = (rows(x) for x in (q, k, v, agents))
    B, h, N, d = q.shape
    a, dv = agents.shape[2], v.shape[3]
    held, agents_stats = _gather_all(agents, k, v, key_bias, size, scale)
    out, stats = heads_last(v, (B, h, N, dv)), q.new_empty(B, h, N, 2, dtype=torch.float32)
    strides = [s for x in (q, agents, out) for s in x.stride()[:3]]
    launch(
        _spread,
        lambda b: B * h * triton.cdiv(N, b["BLOCK_N"]),
        *(q, agents, held, resized(query_bias, size, q), out, stats, *strides, h, N, a, scale * LOG2E),
        *map_sizes(query_bias, size),
        configs=_configs(q.dtype, max(d, dv), a, own="BLOCK_N", other="BLOCK_A"),
        **_widths(d, dv),
        HAS_BIAS=query_bias is not None,
    )
    return out, held, agents_stats, stats


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    key_bias: Bias | None,
    query_bias: Bias | None,
    size: tuple[int, int],
    scale: float,
    held: Tensor,
    agents_stats: Tensor,
    stats: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Bias | None, Bias | None]:
    """Gradients of q, k, v and agents, and of the tables of both biases."""
    dout, q, k, v, agents = (rows(x) for x in (dout, q, k, v, agents))
    dq, dk, dvalues = (heads_last(x, x.shape) for x in (q, k, v))
    spread = _Side(q, dout, agents, held, query_bias, size, scale, stats, spread=True)
    spread.by_tokens(dq, None)
    dagents, dheld = spread.by_agents()
    gather = _Side(k, v, agents, dheld, key_bias, size, scale, agents_stats, spread=False)
    gather.sums, _ = gather.by_agents(sums=True)
    gather.by_tokens(dk, dvalues)
    dagents = (dagents + gather.by_agents()[0]).to(agents.dtype)
    return dq, dk, dvalues, dagents, gather.by_bias(), spread.by_bias()


def _gather_all(
    agents: Tensor, k: Tensor, v: Tensor, bias: Bias | None, size: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor]:
    """What each agent gathers from all tokens, ``(B, h, a, dv)``, and its softmax statistics, in fp32."""
    B, h, a, d = agents.shape
    N, dv = v.shape[2:]
    configs = _configs(k.dtype, max(d, dv), a, own="BLOCK_A", other="BLOCK_N")
    run, runs = _runs(N, B * h * triton.cdiv(a, configs[0].blocks["BLOCK_A"]))
    parts, stats = (k.new_empty(runs, B, h, a, n, dtype=torch.float32) for n in (dv, 2))
    strides = [s for x in (agents, k, v) for s in x.stride()[:3]]
    launch(
        _gather,
        lambda b: B * h * triton.cdiv(a, b["BLOCK_A"]) * runs,
        *(agents, k, v, resized(bias, size, k), parts, stats, *strides, B, h, N, a, run, runs, scale * LOG2E),
        *map_sizes(bias, size),
        configs=configs,
        **_widths(d, dv),
        HAS_BIAS=bias is not None,
    )
    if runs == 1:
        return parts[0], stats[0]
    held, total_stats = torch.empty_like(parts[0]), torch.empty_like(stats[0])
    launch(
        _combine,
        lambda b: triton.cdiv(B * h * a, b["BLOCK_A"]),
        *(parts, stats, held, total_stats, B * h * a, runs),
        configs=[Config({"BLOCK_A": 16}, warps=4)],
        **{"DV": dv, "BLOCK_DV": block(dv)},
    )
    return held, total_stats


class _Side:
    """One of the two softmaxes, backward; see `_agent_backward`.

    Args:
        tokens: Queries or keys ``(B, h, N, d)``.
        x: Gradient of the output, or values ``(B, h, N, dv)``.
        agents: ``(B, h, a, d)``.
        y: What agents hold, or its gradient, ``(B, h, a, dv)``, fp32.
        bias: Tables.
        size: Of the map.
        scale: Factor on the products.
        stats: Softmax statistics of the rows.
        spread: Whether tokens are the rows; `by_tokens` then writes their sums. For agents, ``sums`` is to be set.
    """

    def __init__(
        self,
        tokens: Tensor,
        x: Tensor,
        agents: Tensor,
        y: Tensor,
        bias: Bias | None,
        size: tuple[int, int],
        scale: float,
        stats: Tensor,
        *,
        spread: bool,
    ) -> None:
        self.tokens, self.x, self.agents, self.y, self.stats, self.spread = tokens, x, agents, y, stats, spread
        self.sums = stats.new_empty(stats.shape[:3])
        self.bias, self.size, self.tables = bias, size, resized(bias, size, tokens)
        self.strides = [s for t in (tokens, x, agents) for s in t.stride()[:3]]
        self.scales = (scale, scale * LOG2E)
        d, dv = tokens.shape[3], x.shape[3]
        self.width = max(d, dv)
        self.constants = {**_widths(d, dv), "SPREAD": spread}

    def by_tokens(self, dtokens: Tensor, dx: Tensor | None) -> None:
        """Write the gradient of the tokens, and of ``x`` where agents are the rows."""
        B, h, N, _ = self.tokens.shape
        a = self.agents.shape[2]
        dx = dtokens if dx is None else dx
        written = [s for t in (dtokens, dx) for s in t.stride()[:3]]
        launch(
            _agent_backward.by_tokens,
            lambda b: B * h * triton.cdiv(N, b["BLOCK_N"]),
            *(self.tokens, self.x, self.agents, self.y, self.tables, self.stats, self.sums, dtokens, dx),
            *(*self.strides, *written, h, N, a, *self.scales, *map_sizes(self.bias, self.size)),
            configs=_configs(self.x.dtype, self.width, a, own="BLOCK_N", other="BLOCK_A"),
            **self.constants,
            HAS_BIAS=self.bias is not None,
        )

    def by_agents(self, *, sums: bool = False) -> tuple[Tensor, Tensor]:
        """Return the gradients of the agents and, where tokens are the rows, of ``y``; in fp32.

        With ``sums``, where agents are the rows, return the rows' sums instead of the first.
        """
        B, h, N, d = self.tokens.shape
        a, dv = self.y.shape[2:]
        configs = _configs(self.x.dtype, self.width, a, own="BLOCK_A", other="BLOCK_N")
        run, runs = _runs(N, B * h * triton.cdiv(a, configs[0].blocks["BLOCK_A"]))
        channels = ((() if sums else (d,)), ((dv,) if self.spread else (0,)))
        first, second = (self.x.new_empty(runs, B, h, a, *c, dtype=torch.float32) for c in channels)
        launch(
            _agent_backward.by_agents,
            lambda b: B * h * triton.cdiv(a, b["BLOCK_A"]) * runs,
            *(self.tokens, self.x, self.agents, self.y, self.tables, self.stats, self.sums, first, second),
            *(*self.strides, B, h, N, a, run, runs, *self.scales, *map_sizes(self.bias, self.size)),
            configs=configs,
            **self.constants,
            HAS_BIAS=self.bias is not None,
            SUMS=sums,
        )
        return first.sum(0), second.sum(0)

    def by_bias(self) -> Bias | None:
        """Return the gradients of the bias's tables."""
        if self.bias is None:
            return None
        B, h, N, _ = self.tokens.shape
        a = self.agents.shape[2]
        # Few positions and agents leave processors idle, unless runs of the batch are summed apart.
        runs = min(B, triton.cdiv(PROGRAMS, h * triton.cdiv(N, 64) * triton.cdiv(a, 64)))
        dbias = self.x.new_empty(runs, h, N, a, dtype=torch.float32)
        launch(
            _agent_backward.by_bias,
            lambda b: runs * h * triton.cdiv(N, b["BLOCK_N"]) * triton.cdiv(a, b["BLOCK_A"]),
            *(self.tokens, self.x, self.agents, self.y, self.tables, self.stats, self.sums, dbias),
            *(*self.strides, B, h, N, a, runs, self.scales[1], *map_sizes(self.bias, self.size)),
            configs=_configs(self.x.dtype, self.width, a, own="BLOCK_N", other="BLOCK_A"),
            **self.constants,
        )
        return to_tables(dbias.sum(0), self.bias, self.size)


def _runs(tokens: int, programs: int) -> tuple[int, int]:
    """Tokens of a run, and how many runs there are, for a kernel that has ``programs`` without runs."""
    wanted = max(1, min(PROGRAMS // max(1, programs), triton.cdiv(tokens, RUN)))
    run = triton.cdiv(triton.cdiv(tokens, wanted), 64) * 64
    return run, triton.cdiv(tokens, run)


def _configs(dtype: torch.dtype, width: int, agents: int, *, own: str, other: str) -> list[Config]:
    """Blocks of agents no larger than there are agents; the biases take registers that other attention has to spare."""
    config = attention_configs(dtype, max(width, 64), own=own, other=other)[0]
    if dtype != torch.float32:
        config = Config({own: 32, other: 16}, warps=4, stages=1)
    elif width > 64:
        config = Config({own: 16, other: 16}, warps=8, stages=1)
    blocks = {**config.blocks, "BLOCK_A": min(config.blocks["BLOCK_A"], block(agents))}
    return [Config(blocks, config.warps, config.stages)]


def _widths(d: int, dv: int) -> dict[str, int]:
    return {"D": d, "DV": dv, "BLOCK_D": block(d), "BLOCK_DV": block(dv)}


@triton.jit
def _gather(
    agents, k, v, tables, parts, stats,
    a_b, a_h, a_n, k_b, k_h, k_n, v_b, v_h, v_n,
    B, heads, N, a, run, runs, scale2, P, H, W, grid_w,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(a, BLOCK_A)
    part = tl.program_id(0) // runs
    group = (part // blocks).to(tl.int64)
    b, head = group // heads, group % heads
    k += b * k_b + head * k_h
    v += b * v_b + head * v_h
    agent = part % blocks * BLOCK_A + tl.arange(0, BLOCK_A)
    queries = load_rows(agents + b * a_b + head * a_h, agent, a_n, agent < a, D, BLOCK_D)

    top = tl.full((BLOCK_A,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_A,), tl.float32)
    result = tl.zeros((BLOCK_A, BLOCK_DV), tl.float32)
    number = tl.program_id(0) % runs
    last = tl.minimum(N, (number + 1) * run)
    for start in range(number * run, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        keys = load_rows(k, n, k_n, n < last, D, BLOCK_D)
        logits = dot(queries, tl.trans(keys)) * scale2
        if HAS_BIAS:
            valid = (n < last)[None, :] & (agent < a)[:, None]
            logits += interpolate(tables, n[None, :], agent[:, None], valid, head, a, P, H, W, grid_w)
        logits = tl.where((n < last)[None, :], logits, float("-inf"))
        weights, shrink, top, total = online_softmax(logits, top, total)
        values = load_rows(v, n, v_n, n < last, DV, BLOCK_DV)
        result = dot(weights.to(values.dtype), values, result * shrink[:, None])
    out = (number * B * heads + group) * a + agent
    inverse = store_stats(stats, out, agent < a, top, total)
    store_rows(parts, out, DV, agent < a, result * inverse[:, None], DV, BLOCK_DV)


@triton.jit
def _combine(
    parts, stats, held, total_stats, size, runs, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_A: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK_A + tl.arange(0, BLOCK_A)
    top = tl.full((BLOCK_A,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_A,), tl.float32)
    result = tl.zeros((BLOCK_A, BLOCK_DV), tl.float32)
    for number in range(0, runs):
        run_top, run_inverse = load_stats(stats, number * size + at, at < size)
        new_top = tl.maximum(top, run_top)
        weight, shrink = tl.exp2(run_top - new_top) / run_inverse, tl.exp2(top - new_top)
        values = load_rows(parts, number * size + at, DV, at < size, DV, BLOCK_DV)
        result = result * shrink[:, None] + weight[:, None] * values
        top, total = new_top, total * shrink + weight
    inverse = store_stats(total_stats, at, at < size, top, total)
    store_rows(held, at, DV, at < size, result * inverse[:, None], DV, BLOCK_DV)


@triton.jit
def _spread(
    q, agents, held, tables, out, stats,
    q_b, q_h, q_n, a_b, a_h, a_n, out_b, out_h, out_n,
    heads, N, a, scale2, P, H, W, grid_w,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_N)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    b, head = group // heads, group % heads
    agents += b * a_b + head * a_h
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    queries = load_rows(q + b * q_b + head * q_h, n, q_n, n < N, D, BLOCK_D)

    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    result = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for start in range(0, a, BLOCK_A):
        agent = start + tl.arange(0, BLOCK_A)
        keys = load_rows(agents, agent, a_n, agent < a, D, BLOCK_D)
        logits = dot(queries, tl.trans(keys)) * scale2
        if HAS_BIAS:
            valid = (n < N)[:, None] & (agent < a)[None, :]
            logits += interpolate(tables, n[:, None], agent[None, :], valid, head, a, P, H, W, grid_w)
        logits = tl.where((agent < a)[None, :], logits, float("-inf"))
        weights, shrink, top, total = online_softmax(logits, top, total)
        values = load_rows(held, group * a + agent, DV, agent < a, DV, BLOCK_DV).to(queries.dtype)
        result = dot(weights.to(queries.dtype), values, result * shrink[:, None])
    inverse = store_stats(stats, group * N + n, n < N, top, total)
    store_rows(out + b * out_b + head * out_h, n, out_n, n < N, result * inverse[:, None], DV, BLOCK_DV)
