"""UPerNet with NAT-S, 160 000 iterations of ADE20K.

Reported in the paper and its repository: mIoU 48.0, mIoU at several scales 49.5 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "upernet_nat_mini_160k_ade20k-512x512.py"

model = dict(
    backbone=dict(name="nat_s", drop_path_rate=0.5),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
