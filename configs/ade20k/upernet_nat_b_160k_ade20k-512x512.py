"""UPerNet with NAT-B, 160 000 iterations of ADE20K.

Reported in the paper and its repository: mIoU 48.5, mIoU at several scales 49.7 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "upernet_nat_mini_160k_ade20k-512x512.py"

model = dict(
    backbone=dict(name="nat_b", drop_path_rate=0.5),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
