"""RetinaNet with DaViT-T, 36 epochs of COCO, multi-scale.

Reported in the paper and its repository: box AP 46.5 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/detection.py",
    "../_base_/models/retinanet.py",
    "../_base_/datasets/coco_detection_ms.py",
    "../_base_/schedules/coco_3x.py",
]

model = dict(backbone=dict(name="davit_tiny", drop_path_rate=0.2), neck=dict(in_channels=[192, 384, 768]))
