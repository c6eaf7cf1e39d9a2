"""What a model's outputs depend on, by derivatives: Grad-CAM and the effective receptive field."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visionattn.analysis._geometry import Size
from visionattn.analysis._stages import UnknownLayerError, as_map, captured, differentiating, one_image, stage_names


class NoEvidenceError(ValueError):
    """A class's logit does not depend on a layer's map; the message names both."""


@dataclass(frozen=True, eq=False)
class GradCam:
    """Evidence for one class at the places of a layer's map.

    Attributes:
        map: ``(H, W)``, not negative, in units of the logit.
        layer: The layer's name.
        target: The class.
        logits: Of all classes, ``(classes,)``.
    """

    map: Tensor
    layer: str
    target: int
    logits: Tensor


def grad_cam(model: nn.Module, x: Tensor, *, layer: str | None = None, target: int | None = None) -> GradCam:
    """Weigh the channels of a layer by the mean derivative of a class's logit, sum, rectify (arXiv:1610.02391, eq. 2).

    Args:
        model: A classifier in eval mode.
        x: One image ``(1, C, H, W)``, normalised as the model expects.
        layer: Name of a module whose output is a map or the tokens of one. The last stage if None; where a class token
            classifies, the first norm of the last block, behind which patches still matter.
        target: The class; the predicted one if None.

    Raises:
        ValueError: ``x`` is not one image, or the class does not exist.
        NoEvidenceError: the logit does not depend on the layer's map.
        UnknownLayerError: there is no such layer, or its output is no map.
    """
    image = one_image(x)
    name = _last_layer(model) if layer is None else layer
    with differentiating(), captured(model, [name]) as found:
        logits = model(x.detach().clone().requires_grad_())
        if logits.ndim != 2:
            raise ValueError(f"{type(model).__name__} is no classifier: it returns {tuple(logits.shape)}")
        chosen = int(logits[0].argmax()) if target is None else target
        if not 0 <= chosen < logits.shape[1]:
            raise ValueError(f"class {chosen} does not exist; the model has {logits.shape[1]}")
        if name not in found:
            raise UnknownLayerError(f"layer {name!r} does not run in the forward pass; name another")
        as_map(model, name, found[name], image)  # before a derivative is taken: a clear error
        (grad,) = torch.autograd.grad(logits[0, chosen], found[name], allow_unused=True)
    features = as_map(model, name, found[name].detach(), image)[0]
    slope = None if grad is None else as_map(model, name, grad, image)[0]
    if slope is None or not slope.any():
        raise NoEvidenceError(f"the logit does not depend on the map of layer {name!r}: name one further in front")
    cam = (slope.mean(dim=(1, 2))[:, None, None] * features).sum(dim=0).relu()
    return GradCam(cam.cpu(), name, chosen, logits[0].detach().cpu())


def _last_layer(model: nn.Module) -> str:
    name = stage_names(model)[-1]
    norm = f"{name}.norm1"
    by_token = getattr(model, "global_pool", None) == "token" or getattr(model, "cls_token", None) is not None
    return norm if by_token and norm in dict(model.named_modules()) else name


@dataclass(frozen=True, eq=False)
class ReceptiveField:
    """How much each pixel contributes to the central unit of a layer.

    Attributes:
        layer: The layer's name.
        map: Mean absolute derivative over images, summed over the image's channels: ``(H, W)``.
        centre: ``(y, x)`` of the unit in pixels.
        images: How many images it is the mean of.
    """

    layer: str
    map: Tensor
    centre: tuple[float, float]
    images: int

    def area_ratio(self, share: float) -> float:
        """Part of the image that the smallest square around the unit takes up which holds ``share`` of the total.

        Raises:
            ValueError: ``share`` is not between 0 and 1.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share}")
        H, W = self.map.shape
        rows, columns = torch.arange(H) + 0.5, torch.arange(W) + 0.5
        away = torch.maximum((rows - self.centre[0]).abs()[:, None], (columns - self.centre[1]).abs())  # to a square
        reach, order = away.flatten().sort()
        sums = self.map.flatten().double()[order].cumsum(0)
        enough = int((sums >= share * sums[-1] * (1 - 1e-12)).to(torch.uint8).argmax())
        return float((reach <= reach[enough]).sum()) / (H * W)


def receptive_fields(
    model: nn.Module, images: Iterable[Tensor], *, layers: Sequence[str] | None = None
) -> list[ReceptiveField]:
    """Derive the central unit of layers by the image, on the average of images (arXiv:1701.04128, section 4).

    The unit is the sum of its positive channels.

    Args:
        model: In eval mode.
        images: Images ``(1, C, H, W)`` of one size, normalised as the model expects.
        layers: Names of modules whose outputs are maps; the ends of the stages if None.

    Raises:
        ValueError: there are no images, or they differ in size.
        UnknownLayerError: there is no such layer, or its output is no map.
    """
    names = stage_names(model) if layers is None else list(layers)
    sums: dict[str, Tensor] = {}
    centres: dict[str, tuple[float, float]] = {}
    size: Size | None = None
    count = 0
    for x in images:
        if one_image(x) != (size or one_image(x)):
            raise ValueError(f"images of one size expected, got {size} and {one_image(x)}")
        size, count = one_image(x), count + 1
        with differentiating(), captured(model, names) as found:
            pixels = x.detach().clone().requires_grad_()
            model(pixels)
            for name in names:
                units = as_map(model, name, found[name], size)
                h, w = units.shape[2:]
                unit = units[0, :, h // 2, w // 2].relu().sum()  # all channels of a norm sum to a constant
                (grad,) = torch.autograd.grad(unit, pixels, retain_graph=name != names[-1])
                field = grad[0].abs().sum(dim=0).cpu()
                sums[name] = sums[name] + field if name in sums else field
                centres[name] = ((h // 2 + 0.5) * size[0] / h, (w // 2 + 0.5) * size[1] / w)
    if not count:
        raise ValueError("a receptive field needs at least one image")
    return [ReceptiveField(name, sums[name] / count, centres[name], count) for name in names]
