"""Mask R-CNN with DaViT-S, 12 epochs of COCO, multi-scale.

Reported in the paper and its repository: box AP 47.7, mask AP 42.9 (not measured here).
The authors publish the config of DaViT-T; this is that one at another size.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "mask-rcnn_davit_tiny_fpn_1x-ms_coco.py"

model = dict(backbone=dict(name="davit_small"))
