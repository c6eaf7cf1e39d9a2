"""Mask R-CNN with TransNeXt-B, 12 epochs of COCO.

Reported in the paper: box AP 51.7, mask AP 45.9 (not measured here).
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
    backbone=dict(name="transnext_b", bias_mode="interpolate", img_size=800, drop_path_rate=0.7),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            "query_embedding": dict(decay_mult=0.0),
            "relative_pos_bias_local": dict(decay_mult=0.0),
            "cpb": dict(decay_mult=0.0),
            "temperature": dict(decay_mult=0.0),
            "norm": dict(decay_mult=0.0),
        }
    )
)
