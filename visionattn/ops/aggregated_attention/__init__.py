from visionattn.ops.aggregated_attention.api import IMPLS, aggregated_attention

__all__ = ["IMPLS", "aggregated_attention"]
