"""UPerNet with DiNAT_s-B, 160 000 iterations of ADE20K.

Reported in the paper and its repository: mIoU 49.4, mIoU at several scales 50.2 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "upernet_dinats_t_160k_ade20k-512x512.py"

model = dict(
    backbone=dict(name="dinats_b"),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
