"""Mask R-CNN with BiFormer-S, 12 epochs of COCO.

Reported in the paper: box AP 47.8, mask AP 43.2 (not measured here).
A second run of the authors': box AP 48.1, mask AP 43.6.
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
    backbone=dict(name="biformer_s", n_win=16, drop_path_rate=0.2, norm_eval=True),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}))
