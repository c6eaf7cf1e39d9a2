from visionattn.ops.agent_attention._bias import AgentBias
from visionattn.ops.agent_attention.api import IMPLS, agent_attention

__all__ = ["IMPLS", "AgentBias", "agent_attention"]
