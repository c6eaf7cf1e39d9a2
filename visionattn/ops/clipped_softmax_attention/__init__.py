from visionattn.ops.clipped_softmax_attention.api import IMPLS, clipped_softmax_attention

__all__ = ["IMPLS", "clipped_softmax_attention"]
