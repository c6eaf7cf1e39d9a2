"""Mask R-CNN with Agent-PVT-L, 12 epochs of COCO.

Reported in the repository: box AP 46.9, mask AP 42.8 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "mask-rcnn_agent_pvt_t_fpn_1x_coco.py"

model = dict(backbone=dict(name="agent_pvt_l", drop_path_rate=0.2))
