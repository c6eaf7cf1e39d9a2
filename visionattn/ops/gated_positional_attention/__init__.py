from visionattn.ops.gated_positional_attention.api import IMPLS, gated_positional_attention

__all__ = ["IMPLS", "gated_positional_attention"]
