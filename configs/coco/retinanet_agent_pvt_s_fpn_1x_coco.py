"""RetinaNet with Agent-PVT-S, 12 epochs of COCO.

Reported in the repository: box AP 44.1 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "retinanet_agent_pvt_t_fpn_1x_coco.py"

model = dict(backbone=dict(name="agent_pvt_s"))
