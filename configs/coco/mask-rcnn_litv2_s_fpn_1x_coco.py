"""Mask R-CNN with LITv2-S, 12 epochs of COCO.

Reported in the paper and its repository: box AP 44.9, mask AP 40.8 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/detection.py",
    "../_base_/models/mask_rcnn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/coco_1x.py",
]

model = dict(backbone=dict(name="litv2_s", drop_path_rate=0.2), neck=dict(in_channels=[96, 192, 384, 768]))
optim_wrapper = dict(
    optimizer=dict(lr=2e-4, weight_decay=1e-4), paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)})
)
