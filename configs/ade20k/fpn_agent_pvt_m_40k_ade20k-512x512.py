"""Semantic FPN with Agent-PVT-M, 40 000 iterations of ADE20K.

Reported in the repository: mIoU 44.3 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "fpn_agent_pvt_t_40k_ade20k-512x512.py"

model = dict(backbone=dict(name="agent_pvt_m", drop_path_rate=0.2))
