"""UPerNet with TransNeXt-S, 160 000 iterations of ADE20K.

Reported in the paper: mIoU 52.2, mIoU at several scales 52.5 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/segmentation.py",
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/ade20k_upernet_160k.py",
]

model = dict(
    backbone=dict(name="transnext_s", bias_mode="interpolate", img_size=512, drop_path_rate=0.6),
    decode_head=dict(in_channels=[72, 144, 288, 576]),
    auxiliary_head=dict(in_channels=288),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={
            "query_embedding": dict(decay_mult=0.0),
            "relative_pos_bias_local": dict(decay_mult=0.0),
            "cpb": dict(decay_mult=0.0),
            "temperature": dict(decay_mult=0.0),
            "norm": dict(decay_mult=0.0),
        }
    ),
)
