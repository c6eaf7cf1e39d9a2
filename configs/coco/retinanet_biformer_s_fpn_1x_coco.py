"""RetinaNet with BiFormer-S, 12 epochs of COCO.

Reported in the paper: box AP 45.9 (not measured here).
A second run of the authors': box AP 47.3.
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/detection.py",
    "../_base_/models/retinanet.py",
    "../_base_/datasets/coco_detection.py",
    "../_base_/schedules/coco_1x.py",
]

model = dict(
    backbone=dict(name="biformer_s", n_win=16, drop_path_rate=0.2, norm_eval=True),
    neck=dict(in_channels=[128, 256, 512]),
)
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))
