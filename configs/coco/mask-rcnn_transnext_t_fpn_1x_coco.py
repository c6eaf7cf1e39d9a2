"""Mask R-CNN with TransNeXt-T, 12 epochs of COCO.

Reported in the paper: box AP 49.9, mask AP 44.6 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/detection.py",
    "../_base_/models/mask_rcnn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/coco_1x.py",
]

model = dict(
    backbone=dict(name="transnext_t", bias_mode="interpolate", img_size=800, drop_path_rate=0.4),
    neck=dict(in_channels=[72, 144, 288, 576]),
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
