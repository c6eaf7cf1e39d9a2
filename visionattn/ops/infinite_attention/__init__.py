from visionattn.ops.infinite_attention.api import IMPLS, infinite_attention

__all__ = ["IMPLS", "infinite_attention"]
