"""The mathematics of each attention operator, as functions on tensors."""

from visionattn.ops._dispatch import IMPLS, Impl, UnsupportedError, get_impl, set_autotune, set_impl, use_impl
from visionattn.ops.agent_attention import AgentBias, agent_attention
from visionattn.ops.aggregated_attention import aggregated_attention
from visionattn.ops.channel_attention import channel_attention
from visionattn.ops.clipped_softmax_attention import clipped_softmax_attention
from visionattn.ops.gated_positional_attention import gated_positional_attention
from visionattn.ops.infinite_attention import infinite_attention
from visionattn.ops.linear_attention import linear_attention
from visionattn.ops.neighborhood_attention import neighborhood_attention
from visionattn.ops.routed_attention import routed_attention, topk_regions
from visionattn.ops.sigmoid_gate import sigmoid_gate
from visionattn.ops.window_attention import window_attention

# Folders of this package, each with its IMPLS.
OPERATORS = (
    "agent_attention",
    "aggregated_attention",
    "channel_attention",
    "clipped_softmax_attention",
    "gated_positional_attention",
    "infinite_attention",
    "linear_attention",
    "neighborhood_attention",
    "routed_attention",
    "sigmoid_gate",
    "window_attention",
)

__all__ = [
    "IMPLS",
    "OPERATORS",
    "AgentBias",
    "Impl",
    "UnsupportedError",
    "agent_attention",
    "aggregated_attention",
    "channel_attention",
    "clipped_softmax_attention",
    "gated_positional_attention",
    "get_impl",
    "infinite_attention",
    "linear_attention",
    "neighborhood_attention",
    "routed_attention",
    "set_autotune",
    "set_impl",
    "sigmoid_gate",
    "topk_regions",
    "use_impl",
    "window_attention",
]
