"""UPerNet with TransNeXt-B, 160 000 iterations of ADE20K.

Reported in the paper: mIoU 53.0, mIoU at several scales 53.5 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "upernet_transnext_t_160k_ade20k-512x512.py"

model = dict(
    backbone=dict(name="transnext_b", drop_path_rate=0.7),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
