"""Mask R-CNN with DiNAT_s-S, 36 epochs of COCO, multi-scale.

Reported in the paper and its repository: box AP 48.6, mask AP 43.5 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "mask-rcnn_dinats_t_fpn_3x-ms_coco.py"

model = dict(backbone=dict(name="dinats_s", drop_path_rate=0.35))
