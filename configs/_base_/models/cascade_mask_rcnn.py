"""Cascade Mask R-CNN with a feature pyramid: mmdetection's, any backbone of the library.

The boxes' heads are those that papers on attention backbones compare with: four convolutions and one linear layer with
batch norm over all devices, boxes regressed for each class by GIoU.
"""

_base_ = "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py"

box_head = dict(
    type="ConvFCBBoxHead",
    num_shared_convs=4,
    num_shared_fcs=1,
    in_channels=256,
    conv_out_channels=256,
    fc_out_channels=1024,
    roi_feat_size=7,
    num_classes=80,
    norm_cfg=dict(type="SyncBN", requires_grad=True),
    reg_class_agnostic=False,
    reg_decoded_bbox=True,
    loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
)
model = dict(
    backbone=dict(_delete_=True, type="visionattn.Backbone"),
    roi_head=dict(
        bbox_head=[
            dict(
                **box_head,
                bbox_coder=dict(
                    type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[x / k, x / k, 2 * x / k, 2 * x / k]
                ),
            )
            for x, k in ((0.1, 1), (0.1, 2), (0.1, 3))
        ]
    ),
)
