"""UPerNet with DiNAT_s-S, 160 000 iterations of ADE20K.

Reported in the paper and its repository: mIoU 48.6, mIoU at several scales 49.9 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/segmentation.py",
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/ade20k_upernet_160k.py",
]

model = dict(
    backbone=dict(name="dinats_s", drop_path_rate=0.3, dilations=((1, 16), (1, 8), (1, 2, 1, 3, 1, 4), (1, 2))),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}))
