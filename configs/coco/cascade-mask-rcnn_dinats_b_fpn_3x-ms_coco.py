"""Cascade Mask R-CNN with DiNAT_s-B, 36 epochs of COCO, multi-scale.

Reported in the paper and its repository: box AP 52.6, mask AP 45.3 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/detection.py",
    "../_base_/models/cascade_mask_rcnn.py",
    "../_base_/datasets/coco_instance_ms.py",
    "../_base_/schedules/coco_3x.py",
]

model = dict(
    backbone=dict(name="dinats_b", drop_path_rate=0.6, dilations=((1, 28), (1, 14), (1, 3, 1, 5, 1, 7), (1, 3))),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(
    optimizer=dict(lr=7.5e-5),
    paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
)
