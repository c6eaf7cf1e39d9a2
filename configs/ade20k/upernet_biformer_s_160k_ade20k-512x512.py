"""UPerNet with BiFormer-S, 160 000 iterations of ADE20K.

Reported in the paper: mIoU 49.8, mIoU at several scales 50.8 (not measured here).
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
    backbone=dict(name="biformer_s", n_win=8, drop_path_rate=0.3),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}))
