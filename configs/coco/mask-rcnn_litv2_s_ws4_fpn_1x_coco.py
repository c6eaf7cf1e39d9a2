"""Mask R-CNN with LITv2-S and windows of 4 in stage 3, 12 epochs of COCO.

Reported in the paper and its repository: box AP 44.7, mask AP 40.7 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "mask-rcnn_litv2_s_fpn_1x_coco.py"

model = dict(backbone=dict(local_ws=(0, 0, 4, 1)))
