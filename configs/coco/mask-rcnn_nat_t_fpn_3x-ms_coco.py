"""Mask R-CNN with NAT-T, 36 epochs of COCO, multi-scale.

Reported in the paper and its repository: box AP 47.7, mask AP 42.6 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "mask-rcnn_nat_mini_fpn_3x-ms_coco.py"

model = dict(backbone=dict(name="nat_t"))
