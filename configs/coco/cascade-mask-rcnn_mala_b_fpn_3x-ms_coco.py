"""Cascade Mask R-CNN with MAViT-B, 36 epochs of COCO, multi-scale.

Reported in an account of the paper by others: box AP 55.5, mask AP 48.0 (not measured here).
The authors train in mixed precision: --amp.
To start from ImageNet weights: --cfg-options model.backbone.pretrained=<file>
"""

_base_ = [
    "../_base_/detection.py",
    "../_base_/models/cascade_mask_rcnn.py",
    "../_base_/datasets/coco_instance_ms.py",
    "../_base_/schedules/coco_3x.py",
]

sync_bn = "torch"  # the batch norms of the backbone see the images of all GPUs

model = dict(backbone=dict(name="mala_b", drop_path_rate=0.4), neck=dict(in_channels=[96, 192, 384, 512]))
optim_wrapper = dict(optimizer=dict(lr=4e-4), paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}))
