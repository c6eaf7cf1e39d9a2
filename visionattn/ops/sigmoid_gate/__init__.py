from visionattn.ops.sigmoid_gate.api import IMPLS, sigmoid_gate

__all__ = ["IMPLS", "sigmoid_gate"]
