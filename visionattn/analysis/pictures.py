"""The same findings as pictures, drawn by matplotlib."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from visionattn.analysis.attention import AttentionLayer
from visionattn.analysis.features import lively_channels, principal_colours
from visionattn.analysis.findings import Findings
from visionattn.analysis.gradients import ReceptiveField
from visionattn.analysis.page import PLACES, busiest, class_name, likeliest, logarithmic, percent
from visionattn.extras import require

ROWS = 8  # layers in a picture
OVERVIEW_ROWS = 4  # of many images side by side
HEADS = 4  # of each, beside their mean
CHANNELS = 6  # of a feature map, beside its colours
PANEL = 256  # pixels along the longer side of a panel, at most
EXTENT = (0, 1, 1, 0)
FRAME = "#2fe0ff"


def draw_attention(findings: Findings, image: Any) -> Any:
    """Draw what one patch, the one whose pixels vary most, attends to, in the deepest layer of every kind and size.

    Each row shows the mean over heads and the first heads over the image. Regions that BiFormer routed to are framed;
    channel attention is drawn as matrices of its groups.

    Args:
        findings: What `visionattn.analysis.look` found, attention among it.
        image: The picture as the model sees it (PIL).

    Returns:
        A `matplotlib.figure.Figure`.
    """
    layers, image = shown_layers(findings.attention), _small(image)
    figure, axes = _figure(len(layers), 2 + HEADS, image)
    for axis, layer in zip(axes, layers, strict=True):
        _clear(axis[0], image)
        axis[0].set_ylabel(f"{layer.name}\n{layer.kind}", fontsize=8)
        maps, query = _maps(layer, image)
        for i, cell in enumerate(axis[1:]):
            if i > min(HEADS, layer.heads):
                cell.set_axis_off()
                continue
            channels = layer.operator == "channel_attention"
            title = "mean" if i == 0 else f"{'group' if channels else 'head'} {i}"
            if i and layer.gates is not None:
                title += f", gate {float(layer.gates[i - 1]):.2f}"
            weights = maps.mean(dim=0) if i == 0 else maps[i - 1]
            if channels:
                _clear(cell, weights.numpy(), cmap="inferno")
                cell.set_title(title, fontsize=8)
            else:
                _heat(cell, image, weights, title)
            if i == 0 and query is not None:
                _frames(cell, layer, query)
        if query is not None:
            _frames(axis[0], layer, query, regions=False)
    return figure


def draw_overview(found: Sequence[Findings], images: Sequence[Any], class_names: Sequence[str] | None = None) -> Any:
    """Draw images with the model's prediction, and under each what its liveliest patch attends to, layer by layer.

    Args:
        found: What `visionattn.analysis.look` found in each image, attention among it.
        images: The pictures (PIL).
        class_names: Names of the classes.

    Returns:
        A `matplotlib.figure.Figure`.
    """
    images, of_tokens = [_small(image) for image in images], [x for x in found[0].attention if x.grid is not None]
    names = [layer.name for layer in shown_layers(of_tokens)][-OVERVIEW_ROWS:]
    figure, axes = _figure(1 + len(names), len(images), images[0])
    for j, (findings, image) in enumerate(zip(found, images, strict=True)):
        (number, share), *_ = likeliest(findings.logits, 1)
        _clear(axes[0, j], image)
        axes[0, j].set_title(f"{class_name(number, class_names)[:24]}  {percent(share)}", fontsize=9)
        by_name = {layer.name: layer for layer in findings.attention}
        for cell, name in zip(axes[1:, j], names, strict=True):
            maps, query = _maps(by_name[name], image)
            _heat(cell, image, maps.mean(dim=0), "")
            if query is not None:
                _frames(cell, by_name[name], query)
            if j == 0:
                cell.set_ylabel(f"{name}\n{by_name[name].kind}", fontsize=8)
    figure.suptitle("Attention of the framed patches", fontsize=11)
    return figure


def draw_maps(findings: Findings, image: Any, class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """Draw rollout, Grad-CAM and feature maps, those that there are, as a figure each, by the method's name."""
    figures, image = {}, _small(image)
    if findings.rollout is not None:
        figure, axes = _figure(1, 2, image)
        _clear(axes[0, 0], image)
        _heat(axes[0, 1], image, findings.rollout.map(), "rollout")
        figures["rollout"] = figure
    if findings.cams:
        figure, axes = _figure(1, 1 + len(findings.cams), image)
        _clear(axes[0, 0], image)
        for cell, cam in zip(axes[0, 1:], findings.cams, strict=True):
            _heat(cell, image, cam.map, class_name(cam.target, class_names)[:28], smooth=True)
        axes[0, 0].set_ylabel(findings.cams[0].layer, fontsize=8)
        figures["gradcam"] = figure
    if findings.features:
        figure, axes = _figure(len(findings.features), 1 + CHANNELS, image)
        for row, (name, x) in zip(axes, findings.features.items(), strict=True):
            _clear(row[0], principal_colours(x).numpy())
            row[0].set_ylabel(f"{name}\n{' x '.join(map(str, x.shape))}", fontsize=8)
            numbers = lively_channels(x, CHANNELS).tolist()
            for cell in row[1:]:
                cell.set_axis_off()
            for cell, number in zip(row[1:], numbers, strict=False):
                cell.imshow(x[number].float().numpy(), cmap="gray", extent=EXTENT)
                cell.set_title(f"channel {number}", fontsize=8)
        axes[0, 0].set_title("principal components", fontsize=8)
        figures["features"] = figure
    return figures


def draw_receptive_fields(fields: Sequence[ReceptiveField]) -> Any:
    """Draw effective receptive fields on a logarithmic scale, with the area that holds half and 99 % of them."""
    figure, axes = _figure(1, len(fields), None)
    for cell, found in zip(axes[0], fields, strict=True):
        _clear(cell, logarithmic(found.map).numpy(), cmap="inferno")
        text = f"{found.layer}\n50 % in {percent(found.area_ratio(0.5))}, 99 % in {percent(found.area_ratio(0.99))}"
        cell.set_title(text, fontsize=8)
    figure.suptitle(f"Effective receptive fields, mean of {fields[0].images}", fontsize=10)
    return figure


def shown_layers(layers: Sequence[AttentionLayer]) -> list[AttentionLayer]:
    """The deepest layer of each map's size and kind of operator; four, evenly spaced, where all are of one."""
    last = list({(layer.args[0].shape[2:-1], layer.kind): layer for layer in layers}.values())
    chosen, most = (last, ROWS) if len(last) > 1 else (list(layers), OVERVIEW_ROWS)
    count = min(most, len(chosen))
    return [chosen[(i + 1) * len(chosen) // count - 1] for i in range(count)]


def _maps(layer: AttentionLayer, image: Any) -> tuple[Tensor, tuple[int, int] | None]:
    """Weights ``(heads, H, W)`` of the liveliest patch, and which it is; matrices of channel attention."""
    if layer.operator == "channel_attention":
        return layer.channel_map().float().cpu(), None
    assert layer.grid is not None
    (row, column), (H, W) = busiest(image, PLACES), layer.map_size  # the same place in every layer
    query = (int((row + 0.5) / PLACES[0] * H), int((column + 0.5) / PLACES[1] * W))
    return layer.maps([layer.grid.token(*query)]).weights[:, 0].float().cpu(), None if layer.same_for_all else query


def _small(image: Any) -> Any:
    """The picture at about the resolution of a panel: it is drawn many times."""
    small = image.copy()
    small.thumbnail((PANEL, PANEL))
    return small


def _figure(rows: int, columns: int, image: Any) -> tuple[Any, Any]:
    require("matplotlib", "drawing pictures", "visionattn[train]")
    from matplotlib.figure import Figure

    shape = 1.0 if image is None else image.height / image.width
    figure = Figure(figsize=(1.75 * columns + 0.9, 1.75 * shape * rows + 0.35 * rows + 0.5), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _clear(axis: Any, picture: Any, cmap: str = "gray") -> None:
    axis.imshow(picture, extent=EXTENT, cmap=cmap, aspect="auto")
    axis.set_xticks([])
    axis.set_yticks([])


def _heat(axis: Any, image: Any, values: Tensor, title: str, *, smooth: bool = False) -> None:
    """Lay weights over the darkened image: transparent where they are zero, blue where they are negative."""
    _clear(axis, image.convert("L").point(lambda v: v // 2))
    top = float(values.abs().max()) or 1.0
    signed = float(values.min()) < -1e-3 * top
    shown = (values / top).numpy()
    how = {"cmap": "coolwarm", "vmin": -1} if signed else {"cmap": "inferno", "vmin": 0}
    alpha = (values.abs() / top).pow(0.5).clamp(0, 0.9).numpy()
    axis.imshow(
        shown,
        extent=EXTENT,
        vmax=1,
        alpha=alpha,
        aspect="auto",
        interpolation="bilinear" if smooth else "nearest",
        **how,
    )
    axis.set_title(title, fontsize=8)


def _frames(axis: Any, layer: AttentionLayer, query: tuple[int, int], *, regions: bool = True) -> None:
    from matplotlib.patches import Rectangle

    assert layer.grid is not None
    H, W = layer.map_size
    frame: dict[str, Any] = {"fill": False, "clip_on": False}
    if layer.regions is not None and regions:
        index, parts = layer.regions
        h, w = layer.grid.size[0] // parts[0], layer.grid.size[1] // parts[1]
        own = query[0] // h * parts[1] + query[1] // w
        for p in index[own].tolist():
            at = (p % parts[1] * w / W, p // parts[1] * h / H)
            axis.add_patch(Rectangle(at, w / W, h / H, edgecolor="white", lw=0.8, linestyle=":", **frame))
    axis.add_patch(Rectangle((query[1] / W, query[0] / H), 1 / W, 1 / H, edgecolor=FRAME, lw=1.6, **frame))
