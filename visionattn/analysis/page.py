"""One self-contained HTML page an image: what its patches attend to, by layer and head, and the other methods beside.

The page needs nothing but itself: no network, no other file. Weights are held in 8 bits, between the smallest and the
largest of each row, so that one is off by 1/510 of that range at most.
"""

import base64
import html
import io
import json
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from visionattn.analysis.attention import AttentionLayer, Maps
from visionattn.analysis.features import lively_channels, principal_colours
from visionattn.analysis.findings import Findings
from visionattn.analysis.gradients import ReceptiveField
from visionattn.analysis.rollouts import Rollout

BUDGET = 12 * 2**20  # bytes of attention in a page before they are deflated
ALL = 400  # patches of a map that can be asked one and all, unless the budget calls for fewer
ASKED = 14  # along each side of a larger map
LEAST = 7  # rows and columns of patches, and of keys, that the budget leaves in any case
PLACES = (14, 14)  # parts of an image, of which the liveliest is asked first
CHANNELS = 24  # of a feature map that are shown
DECADES = 4  # of a receptive field's logarithmic scale


def render_page(
    findings: Findings,
    image: Any,
    *,
    title: str,
    model: str,
    origin: str = "",
    class_names: Sequence[str] | None = None,
    budget: int = BUDGET,
) -> str:
    """Return the page as a string.

    Args:
        findings: What `look` found.
        image: The picture as the model sees it (PIL), of any resolution.
        title: Of the page; the image's name.
        model: The model's name.
        origin: A line under it: weights, size.
        class_names: Names of the classes; numbers if None.
        budget: Bytes of attention, before they are deflated; layers are subsampled to keep to it, which the page says.
    """
    plans = _plan(findings.attention, budget)
    layers = [_layer(layer, plan) for layer, plan in zip(findings.attention, plans, strict=True)]
    if layers and findings.unseen:
        known = f"Not shown, for nothing says where their tokens lie: {', '.join(findings.unseen)}."
        for entry in layers:
            entry["notes"] = [*entry.get("notes", []), known]
    rolled = _rollout(findings.rollout) if findings.rollout is not None else None
    grids = [entry["size"] for entry in (*layers, *([rolled] if rolled else []))] or [[14, 14]]
    grid = [max(side) for side in zip(*grids, strict=True)]
    large = [i for i, entry in enumerate(layers) if math.prod(entry["size"]) >= 100 and not entry.get("amongChannels")]
    row, column = busiest(image, PLACES)
    data = {
        "title": title,
        "model": model,
        "origin": origin,
        "image": {"source": _picture(image), "size": [image.height, image.width]},
        "prediction": [[class_name(c, class_names), round(p, 5)] for c, p in likeliest(findings.logits)],
        "grid": grid,
        "query": [int((row + 0.5) * grid[0] / PLACES[0]), int((column + 0.5) * grid[1] / PLACES[1])],
        "start": large[-1] if large else max(0, len(layers) - 1),
        "layers": layers,
        "reason": findings.reasons.get("attention", ""),
        "rollout": {"layer": rolled, "reason": findings.reasons.get("rollout", "")},
        "gradcam": {"maps": _cams(findings, class_names), "reason": findings.reasons.get("gradcam", "")},
        "field": {"maps": [_field(f) for f in findings.fields], "reason": findings.reasons.get("erf", "")},
        "features": {
            "maps": [_features(name, x) for name, x in findings.features.items()],
            "reason": findings.reasons.get("features", ""),
        },
    }
    parts = {
        "@title@": html.escape(f"{title} · {model}"),
        "@css@": _read("page.css"),
        "@js@": _read("page.js"),
        "@data@": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),  # no tag can end the script
    }
    return re.sub("|".join(parts), lambda found: parts[found[0]], _read("page.html"))


def likeliest(logits: Tensor, count: int = 3) -> list[tuple[int, float]]:
    """Classes and their shares, the largest first."""
    shares, classes = logits.softmax(-1).topk(min(count, len(logits)))
    return list(zip(classes.tolist(), shares.tolist(), strict=True))


def class_name(number: int, names: Sequence[str] | None) -> str:
    """Name of a class, or its number where there are no names."""
    return f"class {number}" if names is None or number >= len(names) else names[number]


def busiest(image: Any, grid: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the part of a picture (PIL) whose pixels vary most, not at the border where there are more."""
    grey = image.convert("L").resize((grid[1] * 8, grid[0] * 8))
    pixels = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).float().view(grid[0], 8, grid[1], 8)
    lively = pixels.var(dim=(1, 3))
    if min(grid) > 2:
        lively[[0, -1], :] = lively[:, [0, -1]] = -1
    row, column = divmod(int(lively.argmax()), grid[1])
    return row, column


@dataclass
class _Plan:
    """How finely a layer is kept: every n-th patch is asked, keys are summed over k x k places."""

    layer: AttentionLayer
    asked: tuple[int, int]
    pool: int = 1

    @property
    def bytes(self) -> int:
        """Size of its weights."""
        if self.layer.grid is None or self.layer.operator == "channel_attention":
            return self.layer.heads * self.layer.args[0].shape[-1] ** 2
        H, W = self.layer.map_size
        queries = 1 if self.layer.same_for_all else self.asked[0] * self.asked[1] + 1
        return self.layer.heads * queries * H * W // self.pool**2

    def coarser(self) -> bool:
        """Take a step down: keys first, while the map is large, then patches; False if there is none left."""
        if self.layer.operator == "channel_attention" or self.layer.same_for_all:
            return False
        H, W = self.layer.map_size
        if not (H // self.pool % 2 or W // self.pool % 2) and min(H, W) // self.pool >= 2 * ASKED:
            self.pool *= 2
        elif max(self.asked) > LEAST:
            self.asked = (max(1, self.asked[0] // 2), max(1, self.asked[1] // 2))
        elif not (H // self.pool % 2 or W // self.pool % 2) and min(H, W) // self.pool >= 2 * LEAST:
            self.pool *= 2
        else:
            return False
        return True


def _plan(layers: Sequence[AttentionLayer], budget: int) -> list[_Plan]:
    plans = []
    for layer in layers:
        H, W = (1, 1) if layer.operator == "channel_attention" else layer.map_size
        plans.append(_Plan(layer, (H, W) if H * W <= ALL else (min(H, ASKED), min(W, ASKED))))
    while sum(plan.bytes for plan in plans) > budget:
        if not any(plan.coarser() for plan in sorted(plans, key=lambda plan: -plan.bytes)):
            break
    return plans


def _layer(layer: AttentionLayer, plan: _Plan) -> dict[str, Any]:
    entry = {"name": layer.name, "short": _short(layer.name), "kind": layer.kind, "heads": layer.heads}
    if layer.gates is not None:
        entry["gates"] = [round(g, 4) for g in layer.gates.tolist()]
        entry["gateLabel"] = "by position" if layer.operator == "gated_positional_attention" else "output gate"
    if layer.operator == "channel_attention":
        d = layer.args[0].shape[-1]
        zeros = torch.zeros(layer.heads, d)
        maps = Maps(layer.channel_map()[:, :, None], zeros, zeros)  # a row of the matrix is a map of one row
        return {**entry, "amongChannels": True, **_weights(maps), "size": [d, d], **_asked(range(d), [0], False)}
    (H, W), grid = layer.map_size, layer.grid
    assert grid is not None
    rows, columns = _spread(H, plan.asked[0]), _spread(W, plan.asked[1])
    token = grid.prefix > 0 and not layer.same_for_all
    queries = [grid.token(r, c) for r in rows for c in columns] + ([0] if token else [])
    maps = layer.maps([grid.token(0, 0)] if layer.same_for_all else queries)
    if plan.pool > 1:
        maps = Maps(F.avg_pool2d(maps.weights.float(), plan.pool) * plan.pool**2, maps.prefix, maps.padding)
    entry |= {"size": [H, W], "same": layer.same_for_all, **_weights(maps), **_asked(rows, columns, grid.prefix > 0)}
    if layer.regions is not None:
        index, parts = layer.regions
        span = [grid.size[0] // parts[0], grid.size[1] // parts[1]]
        entry["regions"] = {"grid": list(parts), "span": span, "index": index.tolist()}
    entry["notes"] = _notes(layer, plan, len(rows), len(columns))
    return entry


def _notes(layer: AttentionLayer, plan: _Plan, rows: int, columns: int) -> list[str]:
    H, W = layer.map_size
    notes = []
    if layer.same_for_all:
        notes.append("All queries share one row in this form: it is the centrality of the tokens.")
    elif (rows, columns) != (H, W):
        notes.append(f"Subsampled for the page's size: {rows} x {columns} of the {H} x {W} patches can be asked.")
    if plan.pool > 1:
        notes.append(f"Keys are summed over {plan.pool} x {plan.pool} patches for the page's size.")
    if layer.pooled is not None:
        notes.append("The weight of a pooled key is spread evenly over the area that it pools.")
    if layer.regions is not None:
        notes.append("Dashed: the regions that the patch's region is routed to.")
    if layer.operator in (
        "linear_attention",
        "aggregated_attention",
        "infinite_attention",
        "clipped_softmax_attention",
    ):
        notes.append("These weights are no softmax: rows need not sum to one.")
    return notes


def _rollout(rolled: Rollout) -> dict[str, Any]:
    grid = rolled.grid
    rows, columns = _spread(grid.valid[0], 2 * ASKED), _spread(grid.valid[1], 2 * ASKED)
    queries = [grid.token(r, c) for r in rows for c in columns] + ([0] if grid.prefix else [])
    picked = rolled.matrix[queries]
    weights = picked[:, grid.numbers()].unflatten(1, grid.valid)[None]
    prefix = picked[:, : grid.prefix].sum(dim=1)[None]
    return {
        "name": "all layers",
        "short": "all",
        "kind": "attention rollout",
        "heads": 1,
        "size": list(grid.valid),
        "same": False,
        **_weights(Maps(weights, prefix, torch.zeros_like(prefix))),
        **_asked(rows, columns, grid.prefix > 0),
        "notes": ["The mean over heads plus the identity, multiplied over all layers."],
    }


def _spread(size: int, count: int) -> list[int]:
    count = min(size, count)
    return [(2 * i + 1) * size // (2 * count) for i in range(count)]


def _asked(rows: Sequence[int], columns: Sequence[int], token: bool) -> dict[str, Any]:
    return {"askedRows": list(rows), "askedColumns": list(columns), "token": token}


def _weights(maps: Maps) -> dict[str, Any]:
    """Quantise weights ``(heads, queries, H, W)`` by rows."""
    rows = maps.weights.detach().cpu().double().flatten(2)
    low, high = rows.amin(dim=2).clamp(max=0), rows.amax(dim=2)
    step = (high - low).clamp(min=1e-30)[..., None] / 255
    cells = ((rows - low[..., None]) / step).round().to(torch.uint8)
    sides = torch.stack([low, high, maps.prefix.cpu().double(), maps.padding.cpu().double()])
    return {
        "asked": rows.shape[1],
        "keys": list(maps.weights.shape[2:]),
        "signed": bool((rows.amin() < -1e-3 * rows.abs().amax()).item()),
        "cells": _pack(cells),
        "rows": _pack(sides.float()),
    }


def _cams(findings: Findings, names: Sequence[str] | None) -> list[dict[str, Any]]:
    shares = findings.logits.softmax(-1)
    entries = []
    for cam in findings.cams:
        label = class_name(cam.target, names)
        text = f"{percent(float(shares[cam.target]))}. What speaks for it in {cam.layer}, on {_by(cam.map)} places."
        entries.append(
            {"name": label, "short": label, "title": label, "text": text, "low": "0", "high": "most"} | _grey(cam.map)
        )
    return entries


def _field(found: ReceptiveField) -> dict[str, Any]:
    small = _at_most(found.map[None], 112)[0]
    half, most = found.area_ratio(0.5), found.area_ratio(0.99)
    of = "1 image" if found.images == 1 else f"{found.images} images"
    text = f"half of what the central unit depends on lies in {percent(half)} of the image, 99 % in {percent(most)} "
    return {
        "name": found.layer, "short": _short(found.layer), "title": found.layer, "text": f"{text}(mean of {of}).",
        "low": f"1e-{DECADES} of the most", "high": "most", **_grey(logarithmic(small)),
    }  # fmt: skip


def logarithmic(x: Tensor) -> Tensor:
    """Bring a map that is not negative to [0, 1], `DECADES` powers of ten below its largest value being 0."""
    return (1 + (x / x.max().clamp(min=1e-30)).clamp(min=1e-30).log10() / DECADES).clamp(0, 1)


def _features(name: str, x: Tensor) -> dict[str, Any]:
    x = x.detach().float().cpu()
    colours = _at_most(principal_colours(x).permute(2, 0, 1), 64).permute(1, 2, 0)
    numbers = lively_channels(x, CHANNELS)
    grids = _at_most(x[numbers], 64)
    low, high = (f(grids, dim=(1, 2), keepdim=True) for f in (torch.amin, torch.amax))
    grids = (grids - low) / (high - low).clamp(min=1e-12)
    return {
        "name": name,
        "short": _short(name),
        "title": name,
        "text": f"{x.shape[0]} channels on {x.shape[1]} x {x.shape[2]} places: the three principal components as red, "
        "green and blue. Below, the channels that vary most.",
        "size": list(grids.shape[1:]),
        "cells": _pack((255 * colours).round().to(torch.uint8)),
        "numbers": numbers.tolist(),
        "channelCells": _pack((255 * grids).round().to(torch.uint8)),
    }


def _at_most(x: Tensor, side: int) -> Tensor:
    """Average ``(C, H, W)`` to sides of ``side`` at most."""
    return F.adaptive_avg_pool2d(x, (min(side, x.shape[1]), min(side, x.shape[2])))


def _grey(x: Tensor) -> dict[str, Any]:
    x = x.detach().float().cpu()
    return {"size": list(x.shape), "cells": _pack((255 * x / x.max().clamp(min=1e-30)).round().to(torch.uint8))}


def _pack(x: Tensor) -> str:
    return base64.b64encode(zlib.compress(x.contiguous().numpy().tobytes(), 6)).decode()


def _picture(image: Any) -> str:
    data = io.BytesIO()
    small = max(image.size) <= 128
    image.convert("RGB").save(data, **({"format": "PNG"} if small else {"format": "JPEG", "quality": 88}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(data.getvalue()).decode()}"


def percent(share: float) -> str:
    """A share with a decimal."""
    return f"{100 * share:.1f} %"


def _short(name: str) -> str:
    """``stages.2.blocks.1.attn`` as ``2.1``."""
    path, _, call = name.partition("/")
    numbers = [part for part in path.split(".") if part.isdigit()]
    return (".".join(numbers) or path) + (f"/{call}" if call else "")


def _by(x: Tensor) -> str:
    return " x ".join(map(str, x.shape))


def _read(name: str) -> str:
    return resources.files("visionattn.analysis").joinpath(name).read_text(encoding="utf-8")
