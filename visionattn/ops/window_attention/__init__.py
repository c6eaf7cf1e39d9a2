from visionattn.ops.window_attention.api import IMPLS, window_attention

__all__ = ["IMPLS", "window_attention"]
