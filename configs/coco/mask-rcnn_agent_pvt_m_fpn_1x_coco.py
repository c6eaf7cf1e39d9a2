"""Mask R-CNN with Agent-PVT-M, 12 epochs of COCO.

Reported in the repository: box AP 45.9, mask AP 42.0 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/detection.py",
    "../_base_/models/mask_rcnn.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/coco_1x.py",
]

model = dict(
    backbone=dict(name="agent_pvt_m", pools=(12, 16, 28, 28), drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=1e-4))
