"""UPerNet with BiFormer-B, 160 000 iterations of ADE20K.

Reported in the paper: mIoU 51.0, mIoU at several scales 51.7 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "upernet_biformer_s_160k_ade20k-512x512.py"

model = dict(
    backbone=dict(name="biformer_b", drop_path_rate=0.4),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
