"""UPerNet with Agent-Swin-T, 160 000 iterations of ADE20K.

Reported in the repository: mIoU 46.68 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/segmentation.py",
    "../_base_/models/upernet.py",
    "../_base_/datasets/ade20k.py",
    "../_base_/schedules/ade20k_upernet_160k.py",
]

model = dict(
    backbone=dict(name="agent_swin_t", pools=(9, 12, 14, 7), drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            "relative_position_bias_table": dict(decay_mult=0.0),
            "norm": dict(decay_mult=0.0),
            "key_bias": dict(decay_mult=0.0),
            "query_bias": dict(decay_mult=0.0),
        }
    )
)
