"""UPerNet with NAT-T, 160 000 iterations of ADE20K.

Reported in the paper and its repository: mIoU 47.1, mIoU at several scales 48.4 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "upernet_nat_mini_160k_ade20k-512x512.py"

model = dict(backbone=dict(name="nat_t", drop_path_rate=0.3))
