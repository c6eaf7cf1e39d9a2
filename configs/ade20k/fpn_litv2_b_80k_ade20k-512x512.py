"""Semantic FPN with LITv2-B, 80 000 iterations of ADE20K.

Reported in the paper and its repository: mIoU 47.2 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/segmentation.py",
    "../_base_/models/semantic_fpn.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/ade20k_fpn_80k.py",
]

model = dict(
    backbone=dict(name="litv2_b", norm_outputs=True, drop_path_rate=0.3), neck=dict(in_channels=[128, 256, 512, 1024])
)
