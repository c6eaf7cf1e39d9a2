"""UPerNet with DaViT-S, 160 000 iterations of ADE20K.

Reported in the paper and its repository: mIoU 48.8 (not measured here).
The authors publish the config of DaViT-T; this is that one at another size.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "upernet_davit_tiny_160k_ade20k-512x512.py"

model = dict(backbone=dict(name="davit_small"))
