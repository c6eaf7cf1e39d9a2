"""Semantic FPN with LITv2-B, 80 000 iterations of ADE20K.

Reported in the paper and its repository: mIoU 47.2 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "fpn_litv2_s_80k_ade20k-512x512.py"

model = dict(backbone=dict(name="litv2_b", drop_path_rate=0.3), neck=dict(in_channels=[128, 256, 512, 1024]))
