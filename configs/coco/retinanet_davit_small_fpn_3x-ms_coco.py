"""RetinaNet with DaViT-S, 36 epochs of COCO, multi-scale.

Reported in the paper and its repository: box AP 48.2 (not measured here).
The authors publish the config of DaViT-T; this is that one at another size.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/detection.py",
    "../_base_/models/retinanet.py",
    "../_base_/datasets/coco_detection_ms.py",
    "../_base_/schedules/coco_3x.py",
]

model = dict(backbone=dict(name="davit_small", drop_path_rate=0.2), neck=dict(in_channels=[192, 384, 768]))
