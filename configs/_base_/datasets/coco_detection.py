"""COCO 2017, boxes, images of 800 x 1333 at most, 2 a GPU: mmdetection's."""

_base_ = "mmdet::_base_/datasets/coco_detection.py"
