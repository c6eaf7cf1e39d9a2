"""Mask2Former with TransNeXt-B, 160 000 iterations of ADE20K.

Reported in the repository: mIoU 54.7 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/segmentation.py",
    "../_base_/models/mask2former.py",
    "../_base_/datasets/ade20k_ms.py",
    "../_base_/schedules/ade20k_mask2former_160k.py",
]

custom_imports = dict(imports=["visionattn.dense", "mmdet.models"])

model = dict(
    backbone=dict(name="transnext_b", bias_mode="interpolate", img_size=512, drop_path_rate=0.6),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
)
