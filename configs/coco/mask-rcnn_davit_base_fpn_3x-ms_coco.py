"""Mask R-CNN with DaViT-B, 36 epochs of COCO, multi-scale.

Reported in the paper and its repository: box AP 49.9, mask AP 44.6 (not measured here).
The authors publish the config of DaViT-T; this is that one at another size.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "mask-rcnn_davit_tiny_fpn_3x-ms_coco.py"

model = dict(backbone=dict(name="davit_base"), neck=dict(in_channels=[128, 256, 512, 1024]))
