"""From a registered name to a model: timm's builder with this library's defaults."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def cfg(**kwargs: Any) -> dict[str, Any]:
    """Return a ``pretrained_cfg`` with ImageNet's usual evaluation, changed by ``kwargs``."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head.fc",
        **kwargs,
    }


def create(
    model_cls: type[Model],
    archs: Mapping[str, Mapping[str, Any]],
    variant: str,
    pretrained: bool,
    *,
    out_indices: tuple[int, ...] = (0, 1, 2, 3),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> Model:
    """Build ``variant`` through timm.

    Args:
        model_cls: The family's class.
        archs: What each variant passes to it.
        variant: The registered name.
        pretrained: Load weights; there must be a file or address in the pretrained configuration.
        out_indices: Stages that ``features_only=True`` returns by default.
        device: Where to create the parameters.
        dtype: Their floating type.
        **kwargs: timm's builder arguments, and the class's own; unknown ones raise TypeError.
    """
    for source in ("pretrained_cfg", "pretrained_cfg_overlay"):
        given = kwargs.get(source)
        if isinstance(given, dict) and given.get("file"):  # the authors' files go through visionattn.load_checkpoint
            kwargs[source] = {"custom_load": True, **given}
    with _factory(device, dtype):
        return build_model_with_cfg(
            model_cls,
            variant,
            pretrained,
            feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
            **{**archs[variant], **kwargs},
        )


@contextmanager
def _factory(device: torch.device | str | None, dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        with torch.device(device) if device is not None else torch.device(torch.get_default_device()):
            yield
    finally:
        torch.set_default_dtype(before)
