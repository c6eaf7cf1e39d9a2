"""Parameters and multiply-adds of every classifier, as `visionattn.macs` counts them."""

from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg

from visionattn import fuse, list_models
from visionattn.macs import Cost, Size, cost

# The papers' sizes of images for whole detectors and segmenters, by the folder of configs.
DENSE_SIZES: dict[str, Size] = {"coco": (800, 1280), "ade20k": (512, 2048)}

# Hosted by timm, with this library's operators inside: `visionattn.fuse`.
TIMM_HOSTED = (
    *(f"maxvit_{size}_tf_224" for size in ("tiny", "small", "base", "large")),
    *(f"davit_{size}" for size in ("tiny", "small", "base")),
    *(f"convit_{size}" for size in ("tiny", "small", "base")),
    *(f"shvit_s{i}" for i in range(1, 5)),
)


@dataclass(frozen=True)
class Row(Cost):
    """A count and what was counted: a model's name or a config's path, what it was created with, its input."""

    model: str
    kwargs: dict[str, Any]
    size: Size


def model_names() -> list[str]:
    """Return the names of all classifiers that are counted: this library's, and timm's that it fuses."""
    return [*list_models(), *TIMM_HOSTED]


def native_size(name: str) -> Size:
    """Return the size that a registered name is made for, ``(H, W)``.

    Raises:
        ValueError: no model has that name.
    """
    if not timm.is_model(name):
        raise ValueError(f"no model is named {name!r}; visionattn.list_models() and timm.list_models() list them")
    config: Any = get_pretrained_cfg(name)
    return tuple(config.input_size[1:]) if config is not None else (224, 224)


def count(name: str, size: Size | None = None, **kwargs: Any) -> Row:
    """Count a registered classifier at an input size.

    Args:
        name: Any name registered with timm.
        size: ``(H, W)`` of the image; the size that the name is made for if None.
        **kwargs: Handed to `timm.create_model`.

    Raises:
        ValueError: no model has that name, or it cannot take that size.
    """
    native = native_size(name)
    size = native if size is None else size
    sized: dict[str, Any] = (
        {"img_size": size} if size != native and name.startswith("maxvit") else {}
    )  # for its windows
    with torch.device("meta"):
        model = fuse(timm.create_model(name, **sized, **kwargs)).eval()
    try:
        counted = cost(model, lambda: model(torch.empty(1, 3, *size, device="meta")))
    except (AssertionError, RuntimeError, ValueError) as e:
        raise ValueError(f"{name} cannot be counted at {size[0]} x {size[1]}: {e}") from e
    return Row(**vars(counted), model=name, kwargs=kwargs, size=size)
