"""Mask R-CNN with TransNeXt-B, 12 epochs of COCO.

Reported in the paper: box AP 51.7, mask AP 45.9 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "mask-rcnn_transnext_t_fpn_1x_coco.py"

model = dict(backbone=dict(name="transnext_b", drop_path_rate=0.7), neck=dict(in_channels=[96, 192, 384, 768]))
