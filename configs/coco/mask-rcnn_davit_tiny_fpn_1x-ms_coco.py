"""Mask R-CNN with DaViT-T, 12 epochs of COCO, multi-scale.

Reported in the paper and its repository: box AP 45.0, mask AP 41.1 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/detection.py",
    "../_base_/models/mask_rcnn.py",
    "../_base_/datasets/coco_instance_ms.py",
    "../_base_/schedules/coco_1x.py",
]

model = dict(backbone=dict(name="davit_tiny", drop_path_rate=0.1), neck=dict(in_channels=[96, 192, 384, 768]))
