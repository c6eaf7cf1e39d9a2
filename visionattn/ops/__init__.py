"""The mathematics of each attention operator, as functions on tensors."""

from visionattn.ops._dispatch import IMPLS, Impl, UnsupportedError, get_impl, set_impl, use_impl
from visionattn.ops.linear_attention import linear_attention
from visionattn.ops.routed_attention import routed_attention, topk_regions

OPERATORS = ("linear_attention", "routed_attention")  # folders of this package, each with its IMPLS

__all__ = [
    "IMPLS",
    "OPERATORS",
    "Impl",
    "UnsupportedError",
    "get_impl",
    "linear_attention",
    "routed_attention",
    "set_impl",
    "topk_regions",
    "use_impl",
]
