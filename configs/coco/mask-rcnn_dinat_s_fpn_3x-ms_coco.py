"""Mask R-CNN with DiNAT-S, 36 epochs of COCO, multi-scale.

Reported in the paper and its repository: box AP 49.3, mask AP 44.0 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "mask-rcnn_dinat_mini_fpn_3x-ms_coco.py"

model = dict(backbone=dict(name="dinat_s", drop_path_rate=0.35), neck=dict(in_channels=[96, 192, 384, 768]))
