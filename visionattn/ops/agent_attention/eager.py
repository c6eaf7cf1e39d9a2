"""Fast plain PyTorch: both softmaxes as fused attention with a float bias, no attention matrix kept.

PyTorch's fused attention on the CPU has no gradient for its bias. Training there keeps both matrices, written in place.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from visionattn.ops._dispatch import exporting
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
    """Everything runs, but what exporters make of fused attention with a bias differs from it in memory layout."""
    return "exporters change the layout of fused attention with a bias" if exporting() else None


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
    gather = spread = None
    if size is not None and key_bias is not None:
        gather = expand(key_bias, size, q.dtype)  # (h, a, N)
    if size is not None and query_bias is not None:
        spread = expand(query_bias, size, q.dtype).transpose(-2, -1)  # (h, N, a)
    biases = [x for x in (gather, spread) if x is not None]
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in biases)
    if trained and q.device.type == "cpu":
        agents = agents * scale
        return _kept(q, agents, _kept(agents, k, v, gather), spread)
    return _fused(q, agents, _fused(agents, k, v, gather, scale), spread, scale)


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Softmax attention with a bias ``(h, N, M)`` that all batch items share."""
    mask = None if bias is None else bias.expand(q.shape[0], -1, -1, -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _kept(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The same of scaled operands, with the matrix kept for the backward pass."""
    logits = q @ k.transpose(-2, -1)
    if bias is not None:
        logits += bias
    return logits.softmax(dim=-1) @ v
