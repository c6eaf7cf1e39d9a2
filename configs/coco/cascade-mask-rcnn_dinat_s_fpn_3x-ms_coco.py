"""Cascade Mask R-CNN with DiNAT-S, 36 epochs of COCO, multi-scale.

Reported in the paper and its repository: box AP 52.9, mask AP 45.8 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "cascade-mask-rcnn_dinat_mini_fpn_3x-ms_coco.py"

model = dict(backbone=dict(name="dinat_s", drop_path_rate=0.5), neck=dict(in_channels=[96, 192, 384, 768]))
