"""Triton: neither matrix between tokens and agents is written out, and biases are interpolated where they are used."""

from typing import Any

import torch
from torch import Tensor

from visionattn.kernels._layout import heads_last
from visionattn.ops._register import autocast, differentiable, why_not_triton
from visionattn.ops.agent_attention._bias import AgentBias


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    size: tuple[int, int] | None,
    key_bias: AgentBias | None,
    query_bias: AgentBias | None,
    scale: float,
) -> str | None:
    """CUDA tensors in half or single precision, up to 256 channels a head, at least one token."""
    return why_not_triton(q, k, v) or (None if k.shape[2] else "there are no tokens")


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    size: tuple[int, int] | None,
    key_bias: AgentBias | None,
    query_bias: AgentBias | None,
    scale: float,
) -> Tensor:
    """Agents gather from the tokens, then the queries gather from the agents; both in blocks."""
    none = (None,) * 4
    return _attend(*autocast(q, k, v, agents), *(key_bias or none), *(query_bias or none), *(size or (0, 0)), scale)


def _tables(tables: tuple[Tensor | None, ...]) -> Any:
    return None if tables[0] is None else tables


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    key_grid: Tensor | None,
    key_rows: Tensor | None,
    key_columns: Tensor | None,
    key_prefix: Tensor | None,
    query_grid: Tensor | None,
    query_rows: Tensor | None,
    query_columns: Tensor | None,
    query_prefix: Tensor | None,
    height: int,
    width: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from visionattn.kernels import agent_attention as kernels

    key_bias = _tables((key_grid, key_rows, key_columns, key_prefix))
    query_bias = _tables((query_grid, query_rows, query_columns, query_prefix))
    return kernels.forward(q, k, v, agents, key_bias, query_bias, (height, width), scale)


def _fake(q: Tensor, k: Tensor, v: Tensor, agents: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, h, a, _ = agents.shape
    shapes = ((B, h, a, v.shape[3]), (B, h, a, 2), (*q.shape[:3], 2))
    held, agents_stats, stats = (q.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return heads_last(v, v.shape), held, agents_stats, stats


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    key_grid: Tensor | None,
    key_rows: Tensor | None,
    key_columns: Tensor | None,
    key_prefix: Tensor | None,
    query_grid: Tensor | None,
    query_rows: Tensor | None,
    query_columns: Tensor | None,
    query_prefix: Tensor | None,
    height: int,
    width: int,
    scale: float,
    held: Tensor,
    agents_stats: Tensor,
    stats: Tensor,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # of q, k, v and agents, then of the tables
    from visionattn.kernels import agent_attention as kernels

    key_bias = _tables((key_grid, key_rows, key_columns, key_prefix))
    query_bias = _tables((query_grid, query_rows, query_columns, query_prefix))
    *tokens, dkey_bias, dquery_bias = kernels.backward(
        dout, q, k, v, agents, key_bias, query_bias, (height, width), scale, held, agents_stats, stats
    )
    tables = (*(dkey_bias or (None,) * 4), *(dquery_bias or (None,) * 4))
    grads: Any = (*tokens, *(dout.new_empty(0) if x is None else x for x in tables))
    return grads


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, agents: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    tables = (dout.new_empty(0) if x is None else x.new_empty(x.shape) for x in rest[:8])
    return *(heads_last(x, x.shape) for x in (q, k, v)), agents.new_empty(agents.shape), *tables


_attend = differentiable(
    "agent_attention_triton", _forward, _fake, _backward, fake_backward=_fake_backward, save=[1, 2, 3]
)
