"""Parameters and multiply-adds of whole detectors and segmenters, as the papers count them, on the meta device.

mmdetection's convention for two-stage detectors is kept: heads see 1000 boxes, of which 100 have masks. Auxiliary
heads, which are for training, hold parameters and cost nothing.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.analysis.flops import DENSE_SIZES, Row
from visionattn.extras import require
from visionattn.macs import Cost, Size, cost

SIZES = {"mmdet": DENSE_SIZES["coco"], "mmseg": DENSE_SIZES["ade20k"]}
BOXES, MASKS = 1000, 100
EXTRA = "visionattn[dense]"


def build(path: str | Path) -> tuple[nn.Module, str]:
    """Build the model of an mmengine config on the meta device, in eval mode.

    Args:
        path: A config of mmdetection or mmsegmentation.

    Returns:
        The model and its toolbox, ``"mmdet"`` or ``"mmseg"``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It does not say whose it is.
        MissingExtraError: A package of the ``dense`` extra is not installed.
    """
    engine = require("mmengine", "Counting a config", EXTRA)
    registry = require("mmengine.registry", "Counting a config", EXTRA)
    cfg: Any = engine.Config.fromfile(str(path))
    scope = cfg.get("default_scope")
    if scope not in SIZES:
        raise ValueError(f"{path} must set default_scope to one of {', '.join(SIZES)}, got {scope!r}")
    require(scope, str(path), EXTRA)
    with torch.device("meta"), registry.DefaultScope.overwrite_default_scope(scope):
        return registry.MODELS.build(cfg.model).eval(), scope


def count_config(path: str | Path, size: Size | None = None) -> Row:
    """Count the detector or segmenter of an mmengine config.

    Args:
        path: A config of mmdetection or mmsegmentation.
        size: ``(H, W)`` of the image; the papers' if None, 800 x 1280 for detectors and 512 x 2048 for segmenters.

    Returns:
        The count. Of models with deformable attention (Mask2Former), the parameters alone; multiply-adds are 0.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The config is not of a kind that is counted.
    """
    model, scope = build(path)
    size = size or SIZES[scope]
    counted = model_cost(model, size)
    return Row(**vars(counted), model=str(path), kwargs={}, size=size)


def model_cost(model: Any, size: Size) -> Cost:
    """Count a detector or segmenter of mmdetection's or mmsegmentation's, which is on the meta device."""
    if type(getattr(model, "decode_head", None)).__name__ == "Mask2FormerHead":
        return cost(model, lambda: None)  # its deformable attention reads where to look from tensors' values

    def run() -> None:
        maps = model.extract_feat(torch.empty(1, 3, *size, device="meta"))
        if hasattr(model, "decode_head"):
            model.decode_head(maps)
        elif hasattr(model, "roi_head"):
            model.rpn_head(maps)
            _heads(model.roi_head)
        elif hasattr(model, "bbox_head"):
            model.bbox_head(maps)
        else:
            raise ValueError(f"{type(model).__name__} is neither a segmenter nor a one- or two-stage detector")

    return cost(model, run)


def _heads(roi_head: Any) -> None:
    """Run the heads of all stages on what is cut out of the maps for boxes and masks."""
    for count, heads in ((BOXES, roi_head.bbox_head), (MASKS, roi_head.mask_head if roi_head.with_mask else [])):
        each: Any = heads if isinstance(heads, (nn.ModuleList, list)) else [heads]
        for head in each:
            head(_regions(count, head.in_channels, head.roi_feat_size))


def _regions(count: int, channels: int, size: int | Size) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.empty(count, channels, height, width, device="meta")
