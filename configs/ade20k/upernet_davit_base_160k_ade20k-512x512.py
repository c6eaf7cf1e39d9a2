"""UPerNet with DaViT-B, 160 000 iterations of ADE20K.

Reported in the paper and its repository: mIoU 49.4 (not measured here).
The authors publish the config of DaViT-T; this is that one at another size.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/segmentation.py",
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/ade20k_upernet_160k.py",
]

model = dict(
    backbone=dict(name="davit_base", drop_path_rate=0.3),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
