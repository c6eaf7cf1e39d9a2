"""Mask R-CNN with TransNeXt-S, 12 epochs of COCO.

Reported in the paper: box AP 51.1, mask AP 45.5 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "mask-rcnn_transnext_t_fpn_1x_coco.py"

model = dict(backbone=dict(name="transnext_s", drop_path_rate=0.6))
