"""Agent attention: a few agent tokens gather from all tokens, and all tokens gather from the agents."""

from torch import Tensor

from visionattn.ops._check import check_tokens
from visionattn.ops._dispatch import Impl, choose
from visionattn.ops.agent_attention import eager, reference, triton
from visionattn.ops.agent_attention._bias import AgentBias

IMPLS = {"triton": triton, "eager": eager, "reference": reference}


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    *,
    size: tuple[int, int] | None = None,
    key_bias: AgentBias | None = None,
    query_bias: AgentBias | None = None,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attend through ``a`` agents (Agent Attention, arXiv:2312.08874, eq. 4): time and memory are linear in the tokens.

    ``softmax(s q agents^T + B2^T) softmax(s agents k^T + B1) v``: the first softmax, on the right, runs over the
    tokens, the second over the agents. Weights of a query sum to one.

    Args:
        q: Queries ``(B, heads, N, d)``; fp16, bf16, fp32 or fp64.
        k: Keys ``(B, heads, N, d)``.
        v: Values ``(B, heads, N, dv)``.
        agents: Agent tokens ``(B, heads, a, d)``, unscaled; usually queries pooled to a small grid.
        size: ``(H, W)`` of the map whose tokens come last in ``N``; needed with a bias.
        key_bias: ``B1``, of agents on keys, as tables for a map of any size; they are resized to ``size``.
        query_bias: ``B2``, of queries on agents, agents first as well.
        scale: ``s``, on both products; ``d ** -0.5`` if None.
        impl: ``"auto"`` takes the fastest implementation that accepts the input; a named one never falls back.

    Returns:
        ``(B, heads, N, dv)`` in the dtype of ``v``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        UnsupportedError: the named implementation cannot take this input; the message says why.
    """
    check_tokens("agent_attention", q=q, k=k, v=v)
    check_tokens("agent_attention", q=q, agents=agents)
    N, d = q.shape[2:]
    if k.shape[2] != N:
        raise ValueError(f"agent_attention: as many keys as queries expected, got {k.shape[2]} and {N}")
    if agents.shape[-1] != d or agents.shape[2] < 1:
        raise ValueError(f"agent_attention: agents must be (B, heads, a >= 1, d = {d}), got {tuple(agents.shape)}")
    for name, bias in (("key_bias", key_bias), ("query_bias", query_bias)):
        if bias is not None:
            _check_bias(name, bias, q, agents, size)
    args = (q, k, v, agents, size, key_bias, query_bias, d**-0.5 if scale is None else scale)
    return choose("agent_attention", impl, IMPLS, *args).forward(*args)


def _check_bias(name: str, bias: AgentBias, q: Tensor, agents: Tensor, size: tuple[int, int] | None) -> None:
    if size is None:
        raise ValueError(f"agent_attention: {name} needs size=(H, W), the map that the tokens stand for")
    prefix = q.shape[2] - size[0] * size[1]
    given = 0 if bias.prefix is None else bias.prefix.shape[-1]
    if prefix != given:
        raise ValueError(
            f"agent_attention: {q.shape[2]} tokens are {prefix} more than the map's {size[0]} x {size[1]}, "
            f"but {name} has {given} prefix tokens"
        )
    tables = {"grid": (bias.grid, 4), "rows": (bias.rows, 3), "cols": (bias.cols, 3), "prefix": (bias.prefix, 3)}
    for table, (x, ndim) in tables.items():
        if x is not None and (x.ndim != ndim or x.shape[:2] != (q.shape[1], agents.shape[2])):
            raise ValueError(
                f"agent_attention: {name}.{table} must have {ndim} axes and begin with (heads, agents) = "
                f"({q.shape[1]}, {agents.shape[2]}), got {tuple(x.shape)}"
            )
