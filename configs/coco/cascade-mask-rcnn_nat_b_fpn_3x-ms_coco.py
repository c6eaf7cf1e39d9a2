"""Cascade Mask R-CNN with NAT-B, 36 epochs of COCO, multi-scale.

Reported in the paper and its repository: box AP 52.3, mask AP 45.1 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "cascade-mask-rcnn_nat_mini_fpn_3x-ms_coco.py"

model = dict(backbone=dict(name="nat_b", drop_path_rate=0.5), neck=dict(in_channels=[128, 256, 512, 1024]))
