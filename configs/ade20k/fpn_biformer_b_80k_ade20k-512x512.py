"""Semantic FPN with BiFormer-B, 80 000 iterations of ADE20K.

Reported in the paper: mIoU 49.9 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "fpn_biformer_s_80k_ade20k-512x512.py"

model = dict(backbone=dict(name="biformer_b", drop_path_rate=0.3), neck=dict(in_channels=[96, 192, 384, 768]))
