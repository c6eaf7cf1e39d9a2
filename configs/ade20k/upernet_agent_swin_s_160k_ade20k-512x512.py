"""UPerNet with Agent-Swin-S, 160 000 iterations of ADE20K.

Reported in the repository: mIoU 48.08 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "upernet_agent_swin_t_160k_ade20k-512x512.py"

model = dict(backbone=dict(name="agent_swin_s"))
