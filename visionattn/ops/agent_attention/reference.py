"""The definition, with both attention matrices written out."""

from torch import Tensor

from visionattn.ops.agent_attention._bias import AgentBias, expand


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
    """The reference takes everything."""
    return None


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
    """Agents gather from the tokens, then the queries gather from the agents."""
    agents = agents * scale
    gather, spread = agents @ k.transpose(-2, -1), q @ agents.transpose(-2, -1)  # (B, h, a, N), (B, h, N, a)
    if size is not None and key_bias is not None:
        gather = gather + expand(key_bias, size, q.dtype)
    if size is not None and query_bias is not None:
        spread = spread + expand(query_bias, size, q.dtype).transpose(-2, -1)
    return spread.softmax(dim=-1) @ (gather.softmax(dim=-1) @ v)
