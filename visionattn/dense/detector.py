"""Detectors of torchvision around any backbone of the library; they need no build and no config."""

from typing import Any, Literal, get_args

from torch import Tensor, nn

from visionattn.dense.backbone import Backbone
from visionattn.dense.errors import BackboneError
from visionattn.extras import require

Kind = Literal["mask_rcnn", "retinanet", "fcos"]


class PyramidBackbone(nn.Module):
    """A backbone and a feature pyramid in the form that torchvision's detectors take.

    Args:
        body: Maps of rising stride.
        channels: Width of the pyramid.
        extra: One or two levels behind the last: pooled (``"pool"``), or convolved (``"p6p7"``).
    """

    def __init__(self, body: Backbone, channels: int, extra: Literal["pool", "p6p7"]) -> None:
        from torchvision.ops import feature_pyramid_network as fpn

        super().__init__()
        self.body = body
        blocks = fpn.LastLevelMaxPool() if extra == "pool" else fpn.LastLevelP6P7(channels, channels)
        self.fpn = fpn.FeaturePyramidNetwork(body.out_channels_list, channels, blocks)
        self.out_channels = channels
        levels = 1 if extra == "pool" else 2
        self.strides = [*body.strides, *(body.strides[-1] * 2**i for i in range(1, levels + 1))]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the levels ``(B, channels, H / stride, W / stride)`` by name."""
        return self.fpn({str(i): y for i, y in enumerate(self.body(x))})


def torchvision_detector(
    name: str,
    *,
    num_classes: int,
    kind: Kind = "mask_rcnn",
    backbone: dict[str, Any] | None = None,
    fpn_channels: int = 256,
    **kwargs: Any,
) -> nn.Module:
    """Return torchvision's Mask R-CNN, RetinaNet or FCOS around a backbone of the library.

    The detector takes a list of images ``(3, H, W)`` in [0, 1] and, in training, a list of targets, as torchvision's
    own do. Anchors follow the backbone's strides: 8 strides wide in Mask R-CNN, 4 (and two sizes in between) in
    RetinaNet. RetinaNet and FCOS begin at stride 8, as published.

    Args:
        name: A registered model.
        num_classes: Classes, the background among them, as in torchvision: labels are 1 to ``num_classes - 1``.
        kind: ``"mask_rcnn"``, ``"retinanet"`` or ``"fcos"``.
        backbone: Arguments of `Backbone`, such as ``dict(pretrained="biformer_small_best.pth", n_win=16)``.
        fpn_channels: Width of the feature pyramid.
        **kwargs: Arguments of torchvision's detector, such as ``min_size``.

    Raises:
        BackboneError: Unknown ``kind`` or ``name``.
        MissingExtraError: torchvision is not installed.
    """
    if kind not in get_args(Kind):
        raise BackboneError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    if num_classes < 2:
        raise BackboneError(f"num_classes counts the background, so it must be 2 at least, got {num_classes}")
    detection = require("torchvision.models.detection", "torchvision_detector", "torchvision")
    anchors = require("torchvision.models.detection.anchor_utils", "torchvision_detector", "torchvision")
    body = Backbone(name, **(backbone or {}))
    if kind != "mask_rcnn" and body.strides[0] < 8 and "out_indices" not in (backbone or {}):
        body = Backbone(name, **{**(backbone or {}), "out_indices": body.out_indices[1:]})
    body.init_weights()
    pyramid = PyramidBackbone(body, fpn_channels, "pool" if kind == "mask_rcnn" else "p6p7")
    ratios = ((0.5, 1.0, 2.0),) * len(pyramid.strides)
    if kind == "mask_rcnn":
        from torchvision.ops import MultiScaleRoIAlign

        levels = [str(i) for i in range(len(body.strides))]
        defaults: dict[str, Any] = {
            "rpn_anchor_generator": anchors.AnchorGenerator(tuple((8 * s,) for s in pyramid.strides), ratios),
            "box_roi_pool": MultiScaleRoIAlign(levels, output_size=7, sampling_ratio=2),
            "mask_roi_pool": MultiScaleRoIAlign(levels, output_size=14, sampling_ratio=2),
        }
        return detection.MaskRCNN(pyramid, num_classes=num_classes, **{**defaults, **kwargs})
    if kind == "retinanet":
        sizes = tuple(tuple(int(4 * s * 2 ** (i / 3)) for i in range(3)) for s in pyramid.strides)
        defaults = {"anchor_generator": anchors.AnchorGenerator(sizes, ratios)}
        return detection.RetinaNet(pyramid, num_classes=num_classes, **{**defaults, **kwargs})
    sizes = tuple((s,) for s in pyramid.strides)
    defaults = {"anchor_generator": anchors.AnchorGenerator(sizes, ((1.0,),) * len(sizes))}
    return detection.FCOS(pyramid, num_classes=num_classes, **{**defaults, **kwargs})
