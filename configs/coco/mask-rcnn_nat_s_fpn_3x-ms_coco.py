"""Mask R-CNN with NAT-S, 36 epochs of COCO, multi-scale.

Reported in the paper and its repository: box AP 48.4, mask AP 43.2 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "mask-rcnn_nat_mini_fpn_3x-ms_coco.py"

model = dict(backbone=dict(name="nat_s", drop_path_rate=0.35), neck=dict(in_channels=[96, 192, 384, 768]))
