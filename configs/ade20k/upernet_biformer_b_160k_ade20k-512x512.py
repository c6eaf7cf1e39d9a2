"""UPerNet with BiFormer-B, 160 000 iterations of ADE20K.

Reported in the paper: mIoU 51.0, mIoU at several scales 51.7 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/segmentation.py",
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/ade20k_upernet_160k.py",
]

sync_bn = "torch"  # the batch norms of the backbone see the images of all GPUs

model = dict(
    backbone=dict(name="biformer_b", n_win=8, drop_path_rate=0.4),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}))
