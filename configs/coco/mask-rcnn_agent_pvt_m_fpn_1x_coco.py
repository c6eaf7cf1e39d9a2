"""Mask R-CNN with Agent-PVT-M, 12 epochs of COCO.

Reported in the repository: box AP 45.9, mask AP 42.0 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "mask-rcnn_agent_pvt_t_fpn_1x_coco.py"

model = dict(backbone=dict(name="agent_pvt_m"))
