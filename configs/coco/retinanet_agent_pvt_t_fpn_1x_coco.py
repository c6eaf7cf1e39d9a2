"""RetinaNet with Agent-PVT-T, 12 epochs of COCO.

Reported in the repository: box AP 40.3 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/detection.py",
    "../_base_/models/retinanet.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/coco_1x.py",
]

model = dict(
    backbone=dict(name="agent_pvt_t", pools=(12, 16, 28, 28), drop_path_rate=0.1),
    neck=dict(in_channels=[128, 320, 512]),
)
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))
