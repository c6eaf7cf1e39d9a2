"""What every detector shares: mmdetection's runtime, and this library's backbones."""

_base_ = "mmdet::_base_/default_runtime.py"

custom_imports = dict(imports=["visionattn.dense"])
