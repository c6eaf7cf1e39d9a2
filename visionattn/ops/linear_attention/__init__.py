from visionattn.ops.linear_attention.api import IMPLS, linear_attention

__all__ = ["IMPLS", "linear_attention"]
