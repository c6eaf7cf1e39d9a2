"""UPerNet with DiNAT_s-S, 160 000 iterations of ADE20K.

Reported in the paper and its repository: mIoU 48.6, mIoU at several scales 49.9 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "upernet_dinats_t_160k_ade20k-512x512.py"

model = dict(backbone=dict(name="dinats_s"))
