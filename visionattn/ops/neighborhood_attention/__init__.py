from visionattn.ops.neighborhood_attention.api import IMPLS, neighborhood_attention

__all__ = ["IMPLS", "neighborhood_attention"]
