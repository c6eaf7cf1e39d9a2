"""Mask R-CNN with Agent-Swin-S, 12 epochs of COCO, multi-scale.

Reported in the repository: box AP 47.2, mask AP 42.7 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "mask-rcnn_agent_swin_t_fpn_1x-ms_coco.py"

model = dict(backbone=dict(name="agent_swin_s"))
