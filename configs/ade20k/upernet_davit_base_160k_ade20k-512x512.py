"""UPerNet with DaViT-B, 160 000 iterations of ADE20K.

Reported in the paper and its repository: mIoU 49.4 (not measured here).
The authors publish the config of DaViT-T; this is that one at another size.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "upernet_davit_tiny_160k_ade20k-512x512.py"

model = dict(
    backbone=dict(name="davit_base"),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
