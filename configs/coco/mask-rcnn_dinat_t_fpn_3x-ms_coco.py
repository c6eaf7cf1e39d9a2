"""Mask R-CNN with DiNAT-T, 36 epochs of COCO, multi-scale.

Reported in the paper and its repository: box AP 48.6, mask AP 43.5 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "mask-rcnn_dinat_mini_fpn_3x-ms_coco.py"

model = dict(backbone=dict(name="dinat_t"))
