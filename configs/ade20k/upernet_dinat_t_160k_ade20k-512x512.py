"""UPerNet with DiNAT-T, 160 000 iterations of ADE20K.

Reported in the paper and its repository: mIoU 47.8, mIoU at several scales 48.8 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "upernet_dinat_mini_160k_ade20k-512x512.py"

model = dict(backbone=dict(name="dinat_t", drop_path_rate=0.3))
