"""RetinaNet with a feature pyramid from stage 2 on: mmdetection's, any backbone of the library."""

_base_ = "mmdet::_base_/models/retinanet_r50_fpn.py"

model = dict(
    backbone=dict(_delete_=True, type="visionattn.Backbone", out_indices=(1, 2, 3)),
    neck=dict(start_level=0),  # stage 1, which the pyramid leaves out, is not computed into an output either
)
