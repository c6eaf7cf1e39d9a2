"""RetinaNet with LITv2-M, 12 epochs of COCO.

Reported in the paper and its repository: box AP 46.0 (not measured here).
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = "retinanet_litv2_s_fpn_1x_coco.py"

model = dict(backbone=dict(name="litv2_m"))
