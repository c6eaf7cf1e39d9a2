"""Cascade Mask R-CNN with DiNAT_s-L, 36 epochs of COCO, multi-scale.

Reported in the paper and its repository: box AP 54.8, mask AP 47.2 (not measured here).
It starts from weights of ImageNet-22K.
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "cascade-mask-rcnn_dinats_t_fpn_3x-ms_coco.py"

model = dict(backbone=dict(name="dinats_l", drop_path_rate=0.6), neck=dict(in_channels=[192, 384, 768, 1536]))
optim_wrapper = dict(optimizer=dict(lr=5e-5))
