"""Semantic FPN with Agent-PVT-L, 40 000 iterations of ADE20K.

Reported in the repository: mIoU 46.52 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/segmentation.py",
    "../_base_/models/semantic_fpn.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/ade20k_fpn_40k.py",
]

model = dict(
    backbone=dict(name="agent_pvt_l", pools=(12, 16, 28, 28), drop_path_rate=0.1),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
