"""UPerNet with Agent-Swin-B, 160 000 iterations of ADE20K.

Reported in the repository: mIoU 48.73 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "upernet_agent_swin_t_160k_ade20k-512x512.py"

model = dict(
    backbone=dict(name="agent_swin_b", drop_path_rate=0.5),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
