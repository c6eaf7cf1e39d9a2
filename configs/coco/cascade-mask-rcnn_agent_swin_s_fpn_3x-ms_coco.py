"""Cascade Mask R-CNN with Agent-Swin-S, 36 epochs of COCO, multi-scale.

Reported in the repository: box AP 52.6, mask AP 45.5 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/detection.py",
    "../_base_/models/cascade_mask_rcnn.py",
    "../_base_/datasets/coco_instance_ms.py",
    "../_base_/schedules/coco_3x.py",
]

model = dict(
    backbone=dict(name="agent_swin_s", pools=(9, 12, 14, 7), drop_path_rate=0.1),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            "relative_position_bias_table": dict(decay_mult=0.0),
            "norm": dict(decay_mult=0.0),
            "key_bias": dict(decay_mult=0.0),
            "query_bias": dict(decay_mult=0.0),
        }
    )
)
