"""Mask R-CNN with LITv2-B, 12 epochs of COCO.

Reported in the paper and its repository: box AP 47.3, mask AP 42.6 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/detection.py",
    "../_base_/models/mask_rcnn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/coco_1x.py",
]

model = dict(
    backbone=dict(name="litv2_b", drop_path_rate=0.3, grad_checkpointing=True),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(
    optimizer=dict(lr=2e-4, weight_decay=1e-4), paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)})
)
