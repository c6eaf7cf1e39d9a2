from visionattn.ops.routed_attention.api import IMPLS, routed_attention, topk_regions

__all__ = ["IMPLS", "routed_attention", "topk_regions"]
