"""The model that is exported or quantised, from a name and a weight file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from visionattn.fuse import fuse
from visionattn.models import CheckpointError, load_checkpoint
from visionattn.models._checkpoint import read_header
from visionattn.testing import randn

DATA_CONFIG = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")

Size = tuple[int, int]


@dataclass(frozen=True)
class Subject:
    """A model to export, and what is known of its images.

    Attributes:
        model: In eval mode.
        size: ``(H, W)`` of its images.
        data_config: What a training run here wrote of its preprocessing: ``mean``, ``std``, ``crop_pct``, ...; empty
            where the model's own holds.
        class_names: In the order of the labels, where a training run here wrote them.
    """

    model: nn.Module
    size: Size
    data_config: dict[str, Any]
    class_names: list[str] | None


def create(
    name: str, *, checkpoint: str | Path | None = None, size: Size | None = None, fused: bool = True,
    use_ema: bool = False, **kwargs: Any,
) -> Subject:  # fmt: skip
    """Create the model to export.

    Args:
        name: A registered name of this library or of timm.
        checkpoint: An official file, or one that training here wrote: that one says what the model's arguments are.
            Random weights if None.
        size: ``(H, W)``; what the model is made for if None.
        fused: Run the attention of timm's MaxViT, DaViT, ConViT and SHViT on this library's operators.
        use_ema: Take the averaged weights where the file holds both.
        **kwargs: Handed to `timm.create_model`.

    Raises:
        ValueError: no model has that name, or it cannot be made for that size.
        TypeError: it does not take an argument.
        FileNotFoundError: there is no such checkpoint.
        CheckpointError: the file does not fit; the message names what does not.
    """
    if not timm.is_model(name):
        raise ValueError(f"no model is named {name!r}; visionattn.list_models() and timm.list_models() list them")
    header = (read_header(checkpoint) if checkpoint is not None else None) or {}
    if header and header["model"] != name:
        raise CheckpointError(f"{checkpoint} holds the weights of {header['model']}, not of {name}")
    told: dict[str, Any] = {key: header[key] for key in ("num_classes", "in_chans") if key in header}
    kwargs = {**told, **header.get("model_kwargs", {}), **kwargs}
    if size is not None and name.startswith("maxvit") and "img_size" not in kwargs:
        kwargs["img_size"] = size  # for its windows
    model = timm.create_model(name, **kwargs).eval()
    if checkpoint is not None:
        load_checkpoint(model, checkpoint, use_ema=use_ema or getattr(model, "official_ema", False))
    if fused:
        fuse(model)
    data_config = {key: header[key] for key in DATA_CONFIG if key in header}
    cfg: Any = model.pretrained_cfg
    native = _pair(kwargs.get("img_size") or data_config.get("input_size", cfg["input_size"])[1:])
    if size is not None and size != native and hasattr(model, "set_input_size") and not name.startswith("maxvit"):
        model.set_input_size(size)
    return Subject(model, size or native, data_config, header.get("class_names"))


@torch.no_grad()
def settle(subject: Subject, images: int = 4) -> None:
    """Set the averages that BatchNorm layers keep by random images: for models with random weights.

    They start as if activations never grew. In deep models they do, until rounding alone moves the logits.

    Args:
        subject: Its model is in eval mode, and stays so.
        images: How many.

    Raises:
        ValueError: the model does not run at that size.
    """
    model = subject.model
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain average
        layer.train()
    shape = (images, int(getattr(model, "in_chans", 3)), *subject.size)
    try:
        model(randn(*shape))
    except Exception as e:  # models raise what they like where a size does not suit them
        raise ValueError(f"the model does not run on images {shape}: {e}") from e
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
            layer.eval()


def _pair(size: int | Sequence[int]) -> Size:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
