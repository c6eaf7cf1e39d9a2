"""Mask2Former with TransNeXt-T, 160 000 iterations of ADE20K.

Reported in the repository: mIoU 53.4 (not measured here).
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
    backbone=dict(name="transnext_t", bias_mode="interpolate", img_size=512, drop_path_rate=0.3),
    decode_head=dict(in_channels=[72, 144, 288, 576]),
)
