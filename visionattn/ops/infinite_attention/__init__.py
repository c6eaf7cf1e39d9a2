from visionattn.ops.infinite_attention.api import IMPLS, Form, infinite_attention

__all__ = ["IMPLS", "Form", "infinite_attention"]
