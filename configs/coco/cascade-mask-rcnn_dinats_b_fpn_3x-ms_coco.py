"""Cascade Mask R-CNN with DiNAT_s-B, 36 epochs of COCO, multi-scale.

Reported in the paper and its repository: box AP 52.6, mask AP 45.3 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "cascade-mask-rcnn_dinats_t_fpn_3x-ms_coco.py"

model = dict(backbone=dict(name="dinats_b", drop_path_rate=0.6), neck=dict(in_channels=[128, 256, 512, 1024]))
optim_wrapper = dict(optimizer=dict(lr=7.5e-5))
