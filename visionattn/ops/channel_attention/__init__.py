from visionattn.ops.channel_attention.api import IMPLS, channel_attention

__all__ = ["IMPLS", "channel_attention"]
