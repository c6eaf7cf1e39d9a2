"""Mask R-CNN with LITv2-M and windows of 4 in stage 3, 12 epochs of COCO.

Reported in the paper and its repository: box AP 46.5, mask AP 42.0 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "mask-rcnn_litv2_s_fpn_1x_coco.py"

model = dict(backbone=dict(name="litv2_m", local_ws=(0, 0, 4, 1)))
