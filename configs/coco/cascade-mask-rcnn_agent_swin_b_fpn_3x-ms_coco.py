"""Cascade Mask R-CNN with Agent-Swin-B, 36 epochs of COCO, multi-scale.

Reported in the repository: box AP 52.6, mask AP 45.3 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "cascade-mask-rcnn_agent_swin_t_fpn_3x-ms_coco.py"

model = dict(backbone=dict(name="agent_swin_b", drop_path_rate=0.4), neck=dict(in_channels=[128, 256, 512, 1024]))
