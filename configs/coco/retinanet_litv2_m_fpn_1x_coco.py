"""RetinaNet with LITv2-M, 12 epochs of COCO.

Reported in the paper and its repository: box AP 46.0 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/detection.py",
    "../_base_/models/retinanet.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/coco_1x.py",
]

model = dict(backbone=dict(name="litv2_m", drop_path_rate=0.2), neck=dict(in_channels=[192, 384, 768]))
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4), paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}))
