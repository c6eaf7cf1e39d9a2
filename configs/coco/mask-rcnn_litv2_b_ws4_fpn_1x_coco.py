"""Mask R-CNN with LITv2-B and windows of 4 in stage 3, 12 epochs of COCO.

Reported in the paper and its repository: box AP 46.8, mask AP 42.3 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "mask-rcnn_litv2_s_fpn_1x_coco.py"

model = dict(
    backbone=dict(name="litv2_b", drop_path_rate=0.3, grad_checkpointing=True, local_ws=(0, 0, 4, 1)),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
