"""Mask R-CNN with a feature pyramid: mmdetection's, any backbone of the library."""

_base_ = "mmdet::_base_/models/mask-rcnn_r50_fpn.py"

model = dict(backbone=dict(_delete_=True, type="visionattn.Backbone"))
