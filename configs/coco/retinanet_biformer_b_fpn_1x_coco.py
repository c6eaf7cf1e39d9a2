"""RetinaNet with BiFormer-B, 12 epochs of COCO.

Reported in the paper: box AP 47.1 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "retinanet_biformer_s_fpn_1x_coco.py"

model = dict(backbone=dict(name="biformer_b", drop_path_rate=0.3), neck=dict(in_channels=[192, 384, 768]))
