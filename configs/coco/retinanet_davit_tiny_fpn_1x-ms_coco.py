"""RetinaNet with DaViT-T, 12 epochs of COCO, multi-scale.

Reported in the paper and its repository: box AP 44.0 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/detection.py",
    "../_base_/models/retinanet.py",
    "../_base_/datasets/coco_detection_ms.py",
    "../_base_/schedules/coco_1x.py",
]

model = dict(backbone=dict(name="davit_tiny", drop_path_rate=0.1), neck=dict(in_channels=[192, 384, 768]))
