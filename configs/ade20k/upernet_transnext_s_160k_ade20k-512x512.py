"""UPerNet with TransNeXt-S, 160 000 iterations of ADE20K.

Reported in the paper: mIoU 52.2, mIoU at several scales 52.5 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "upernet_transnext_t_160k_ade20k-512x512.py"

model = dict(backbone=dict(name="transnext_s", drop_path_rate=0.6))
