"""Mask R-CNN with DiNAT-T, 36 epochs of COCO, multi-scale.

Reported in the paper and its repository: box AP 48.6, mask AP 43.5 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/detection.py",
    "../_base_/models/mask_rcnn.py",
    "../_base_/datasets/coco_instance_ms.py",
    "../_base_/schedules/coco_3x.py",
]

model = dict(
    backbone=dict(
        name="dinat_t", drop_path_rate=0.2, dilations=((1, 28, 1), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3, 1, 3, 1))
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}))
