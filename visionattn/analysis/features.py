"""Feature maps as pictures."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from visionattn.analysis._stages import as_map, captured, one_image, stage_names


def feature_maps(model: nn.Module, x: Tensor, *, layers: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Run a model on one image and return maps ``(C, H, W)`` by the layer's name.

    Args:
        model: In eval mode.
        x: One image ``(1, C, H, W)``, normalised as the model expects.
        layers: Names of modules whose outputs are maps or the tokens of one; the ends of the stages if None.

    Raises:
        ValueError: ``x`` is not one image.
        UnknownLayerError: there is no such layer, or its output is no map.
    """
    image = one_image(x)
    names = stage_names(model) if layers is None else list(layers)
    with torch.no_grad(), captured(model, names) as found:
        model(x)
    return {name: as_map(model, name, found[name], image)[0].cpu() for name in names}


def principal_colours(features: Tensor) -> Tensor:
    """Colour a map ``(C, H, W)`` by its three principal components: ``(H, W, 3)`` in [0, 1].

    Each component goes from black at its 2nd to full at its 98th percentile; its sign is such that the channel with
    most weight in it counts as positive. Components that do not vary stay grey.
    """
    H, W = features.shape[1:]
    points = features.detach().double().flatten(1).T  # (H * W, C)
    points = points - points.mean(dim=0)
    _, _, axes = torch.linalg.svd(points, full_matrices=False)
    axes = axes[:3] * axes[:3].gather(1, axes[:3].abs().argmax(dim=1, keepdim=True)).sign()
    parts = points @ axes.T  # (H * W, 3 or fewer)
    low, high = (torch.quantile(parts, q, dim=0) for q in (0.02, 0.98))
    span = high - low
    colours = torch.where(span > 1e-12, (parts - low) / span.clamp(min=1e-12), torch.full_like(parts, 0.5))
    grey = torch.full((H * W, 3), 0.5, dtype=colours.dtype)
    grey[:, : colours.shape[1]] = colours.clamp(0, 1)
    return grey.view(H, W, 3).float()


def lively_channels(features: Tensor, count: int) -> Tensor:
    """Numbers of the ``count`` channels of ``(C, H, W)`` that vary most over the map, by falling variance."""
    return features.flatten(1).var(dim=1, correction=0).topk(min(count, features.shape[0])).indices
