"""Cascade Mask R-CNN with DiNAT-B, 36 epochs of COCO, multi-scale.

Reported in the paper and its repository: box AP 53.4, mask AP 46.2 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "cascade-mask-rcnn_dinat_mini_fpn_3x-ms_coco.py"

model = dict(backbone=dict(name="dinat_b", drop_path_rate=0.6), neck=dict(in_channels=[128, 256, 512, 1024]))
optim_wrapper = dict(optimizer=dict(lr=7.5e-5))
