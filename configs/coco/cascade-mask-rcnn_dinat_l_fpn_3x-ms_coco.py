"""Cascade Mask R-CNN with DiNAT-L, 36 epochs of COCO, multi-scale.

Reported in the paper and its repository: box AP 55.3, mask AP 47.8 (not measured here).
It starts from weights of ImageNet-22K.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "cascade-mask-rcnn_dinat_mini_fpn_3x-ms_coco.py"

model = dict(backbone=dict(name="dinat_l", drop_path_rate=0.6), neck=dict(in_channels=[192, 384, 768, 1536]))
optim_wrapper = dict(optimizer=dict(lr=7.5e-5))
