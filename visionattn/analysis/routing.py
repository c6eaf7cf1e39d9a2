"""Pictures of where BiFormer looks: the regions that a query region was routed to."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.layers.attention.routed import RoutingAttention


@dataclass(frozen=True)
class Routing:
    """What one routing attention layer did with a batch.

    Attributes:
        name: The layer's name in the model.
        index: Regions attended to, by falling affinity: ``(B, P, topk)``.
        grid: Regions along H and W; ``P`` is their product.
    """

    name: str
    index: Tensor
    grid: tuple[int, int]


def record_routing(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Routing]]:
    """Run a model and return its output, and what each routing layer routed.

    Args:
        model: A model with `RoutingAttention` layers, such as every BiFormer.
        x: Images ``(B, C, H, W)``, normalised as the model expects.

    Raises:
        ValueError: the model has no routing layer.
    """
    found: list[Routing] = []
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, RoutingAttention):

            def record(layer: Any, args: tuple[Any, ...], name: str = name) -> None:
                index, grid = layer.route(args[0])
                found.append(Routing(name, index.cpu(), grid))

            hooks.append(module.register_forward_pre_hook(record))
    if not hooks:
        raise ValueError(f"{type(model).__name__} has no routing attention; only BiFormer models can be drawn")
    try:
        with torch.no_grad():
            return model(x), found
    finally:
        for hook in hooks:
            hook.remove()


def draw_routing(
    model: nn.Module,
    x: Tensor,
    images: Sequence[Any],
    *,
    class_names: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
) -> Any:
    """Draw images with the model's prediction, and under each where one query region looks, a row for every stage.

    The query, framed in blue, is the region whose pixels vary most. The regions it attends to are shown, brighter the
    higher they rank; the others are dimmed. Stages that route every region to every region are left out.

    Args:
        model: A BiFormer in eval mode.
        x: The images as the model takes them, ``(B, C, H, W)``.
        images: The same as pictures that matplotlib draws (PIL images or arrays).
        class_names: Names of the classes.
        labels: True classes, to mark wrong predictions.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    logits, routings = record_routing(model, x)
    last_of_stage = {r.name.rpartition(".blocks.")[0]: r for r in routings}  # the deepest layer of each stage
    rows = [r for r in last_of_stage.values() if r.index.shape[2] < r.index.shape[1]]
    sure, predicted = logits.softmax(-1).max(-1)
    columns = len(images)
    figure = Figure(figsize=(1.7 * columns + 1.2, 1.9 * (1 + len(rows)) + 0.6), layout="constrained")
    axes = figure.subplots(1 + len(rows), columns, squeeze=False)
    for j, picture in enumerate(images):
        name = str(int(predicted[j])) if class_names is None else class_names[int(predicted[j])]
        right = labels is None or int(labels[j]) == int(predicted[j])
        axes[0, j].imshow(picture, cmap="gray")
        axes[0, j].set_title(f"{name}  {sure[j]:.0%}", color="black" if right else "crimson", fontsize=11)
        for i, routing in enumerate(rows, start=1):
            axis = axes[i, j]
            query = _busiest(x[j], routing.grid)
            seen = torch.full((routing.index.shape[1],), 0.15)
            routed = routing.index[j, query]
            seen[routed] = torch.linspace(1.0, 0.55, len(routed))
            mask = seen.reshape(routing.grid).numpy()
            axis.imshow(picture, cmap="gray", extent=(0, 1, 1, 0))
            axis.imshow(mask, cmap="inferno", vmin=0, vmax=1, alpha=0.55, extent=(0, 1, 1, 0), interpolation="nearest")
            height, width = 1 / routing.grid[0], 1 / routing.grid[1]
            row, column = divmod(query, routing.grid[1])
            frame = Rectangle(
                (column * width, row * height), width, height, fill=False, edgecolor="deepskyblue", lw=2.5
            )
            axis.add_patch(frame)
    for i, routing in enumerate(rows, start=1):
        stage = int(routing.name.split(".")[1]) + 1
        axes[i, 0].set_ylabel(f"stage {stage}\ntop {routing.index.shape[2]} of {routing.index.shape[1]}", fontsize=10)
    axes[0, 0].set_ylabel("prediction", fontsize=10)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle("The regions that the framed query region is routed to (bright) in each stage", fontsize=12)
    return figure


def _busiest(image: Tensor, grid: tuple[int, int]) -> int:
    """Return the region of ``image (C, H, W)`` whose pixels vary most."""
    _, H, W = image.shape
    h, w = H // grid[0], W // grid[1]
    patches = image[:, : h * grid[0], : w * grid[1]].unflatten(2, (grid[1], w)).unflatten(1, (grid[0], h))
    return int(patches.float().var(dim=(0, 2, 4)).argmax())
