"""Mask R-CNN with DaViT-T, 36 epochs of COCO, multi-scale.

Reported in the paper and its repository: box AP 47.4, mask AP 42.9 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/detection.py",
    "../_base_/models/mask_rcnn.py",
    "../_base_/datasets/coco_instance_ms.py",
    "../_base_/schedules/coco_3x.py",
]

model = dict(backbone=dict(name="davit_tiny", drop_path_rate=0.2), neck=dict(in_channels=[96, 192, 384, 768]))
