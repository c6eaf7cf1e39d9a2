"""Every family in a detector of mmdetection and a segmenter of mmsegmentation: loss and gradients at two sizes."""

from typing import Any

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from torch import Tensor, nn

import visionattn.dense  # noqa: F401 - registers
from tests.dense.families import FAMILIES, arguments, backbone

pytestmark = pytest.mark.dense
every_family = pytest.mark.parametrize("family", FAMILIES)
SIZES = [(320, 480), (301, 453)]  # (H, W)


def detector(family: str, kind: str) -> nn.Module:
    init_default_scope("mmdet")
    probe = backbone(family)
    levels = len(probe.strides)
    strides = [*probe.strides, *(probe.strides[-1] * 2**i for i in range(1, 3))][: levels + 1]
    neck = {"type": "FPN", "in_channels": probe.out_channels_list, "out_channels": 16, "num_outs": levels + 1}
    preprocessor = {"type": "DetDataPreprocessor", "pad_mask": kind == "MaskRCNN"}
    common = {"backbone": {"type": "visionattn.Backbone", **arguments(family)}, "neck": neck}
    coder = {"type": "DeltaXYWHBBoxCoder"}
    one = {"type": "MaxIoUAssigner", "pos_iou_thr": 0.5, "neg_iou_thr": 0.4, "min_pos_iou": 0, "ignore_iof_thr": -1}
    if kind == "RetinaNet":
        anchors = {"type": "AnchorGenerator", "octave_base_scale": 4, "scales_per_octave": 1, "ratios": [1.0]}
        head: dict[str, Any] = {
            "bbox_head": {
                "type": "RetinaHead",
                "num_classes": 3,
                "in_channels": 16,
                "feat_channels": 16,
                "stacked_convs": 1,
                "anchor_generator": {**anchors, "strides": strides},
                "bbox_coder": coder,
            },
            "test_cfg": {"rpn": {}, "rcnn": {}},
            "train_cfg": {
                "assigner": one,
                "sampler": {"type": "PseudoSampler"},
                "allowed_border": -1,
                "pos_weight": -1,
            },
        }
    else:
        sampler = {"type": "RandomSampler", "num": 16, "pos_fraction": 0.5}
        extract = {"type": "SingleRoIExtractor", "out_channels": 16, "featmap_strides": probe.strides}
        roi = {"type": "RoIAlign", "output_size": 7, "sampling_ratio": 0}
        head = {
            "rpn_head": {
                "type": "RPNHead",
                "in_channels": 16,
                "feat_channels": 16,
                "anchor_generator": {"type": "AnchorGenerator", "scales": [8], "ratios": [1.0], "strides": strides},
                "bbox_coder": coder,
            },
            "roi_head": {
                "type": "StandardRoIHead",
                "bbox_roi_extractor": {**extract, "roi_layer": roi},
                "bbox_head": {
                    "type": "Shared2FCBBoxHead",
                    "in_channels": 16,
                    "fc_out_channels": 16,
                    "num_classes": 3,
                    "bbox_coder": coder,
                },
                "mask_roi_extractor": {**extract, "roi_layer": {**roi, "output_size": 14}},
                "mask_head": {
                    "type": "FCNMaskHead",
                    "num_convs": 1,
                    "in_channels": 16,
                    "conv_out_channels": 16,
                    "num_classes": 3,
                },
            },
            "test_cfg": {"rpn": {}, "rcnn": {}},
            "train_cfg": {
                "rpn": {"assigner": one, "sampler": sampler, "allowed_border": -1, "pos_weight": -1},
                "rpn_proposal": {
                    "nms_pre": 50,
                    "max_per_img": 20,
                    "nms": {"type": "nms", "iou_threshold": 0.7},
                    "min_bbox_size": 0,
                },
                "rcnn": {
                    "assigner": {**one, "neg_iou_thr": 0.5},
                    "sampler": {**sampler, "add_gt_as_proposals": True},
                    "mask_size": 28,
                    "pos_weight": -1,
                },
            },
        }
    return MODELS.build(ConfigDict({"type": kind, "data_preprocessor": preprocessor, **common, **head}))


def segmenter(family: str) -> nn.Module:
    init_default_scope("mmseg")
    channels = backbone(family).out_channels_list
    return MODELS.build(
        {
            "type": "EncoderDecoder",
            "data_preprocessor": {"type": "SegDataPreProcessor", "size_divisor": 1},
            "backbone": {"type": "visionattn.Backbone", **arguments(family)},
            "decode_head": {
                "type": "UPerHead",
                "in_channels": channels,
                "in_index": list(range(len(channels))),
                "pool_scales": (1, 2),
                "channels": 16,
                "num_classes": 5,
                "norm_cfg": {"type": "BN"},
                "align_corners": False,
            },
            "test_cfg": {"mode": "whole"},
        }
    )


def images(batch: int, size: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for _ in range(batch)]


def boxes(size: tuple[int, int], masks: bool) -> DetDataSample:
    H, W = size
    sample = DetDataSample(metainfo={"img_shape": size, "ori_shape": size, "scale_factor": (1.0, 1.0), "img_id": 0})
    corners = torch.tensor([[10.0, 10.0, 80.0, 90.0], [W - 200.0, H - 180.0, W - 20.0, H - 10.0]])
    sample.gt_instances = InstanceData(bboxes=corners, labels=torch.tensor([0, 2]))
    if masks:
        bitmaps = np.zeros((2, H, W), dtype=np.uint8)
        for bitmap, (x0, y0, x1, y1) in zip(bitmaps, corners.int().tolist(), strict=True):
            bitmap[y0:y1, x0:x1] = 1
        sample.gt_instances.masks = BitmapMasks(bitmaps, H, W)
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    return sample


def check(model: nn.Module, data: list[dict[str, Any]]) -> None:
    model.train()
    for batch in data:
        loss, _ = model.parse_losses(model(**model.data_preprocessor(batch, training=True), mode="loss"))
        assert torch.isfinite(loss)
        loss.backward()
    grads = {k: p.grad for k, p in model.backbone.named_parameters()}
    assert [k for k, g in grads.items() if g is None or not torch.isfinite(g).all()] == []
    assert max(g.abs().max().item() for g in grads.values()) > 0


@every_family
def test_detector(family: str) -> None:
    kind = "MaskRCNN" if list(FAMILIES).index(family) % 2 else "RetinaNet"
    masks = kind == "MaskRCNN"
    check(detector(family, kind), [{"inputs": images(1, s), "data_samples": [boxes(s, masks)]} for s in SIZES])


@every_family
def test_segmenter(family: str) -> None:
    def labels(size: tuple[int, int]) -> SegDataSample:
        sample = SegDataSample(metainfo={"img_shape": size, "ori_shape": size})
        generator = torch.Generator().manual_seed(1)
        sample.gt_sem_seg = PixelData(data=torch.randint(0, 5, (1, *size), generator=generator))
        return sample

    # A batch norm behind pooling to one pixel needs two images.
    check(segmenter(family), [{"inputs": images(2, s), "data_samples": [labels(s), labels(s)]} for s in SIZES])
