"""The README's plots, made from committed measurements: one panel a family, the other families in grey behind it.

A plot is an SVG that holds the digest of what it shows, so that a stale one is told from a fresh one without drawing.
"""

import hashlib
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visionattn.analysis import cards
from visionattn.analysis.scaling import own_accuracy
from visionattn.extras import require

FOLDER = "benchmarks/plots"
RESOLUTION, TRAINING = "benchmarks/resolution_cpu.json", "benchmarks/train_cpu.json"
COLUMNS, INK, GREY = 4, "#0072B2", "#cccccc"  # blue on grey: told apart by lightness alone
VERSION = 1  # of the drawing: raise it with a change that should make plots anew


@dataclass
class Curve:
    """What a panel shows of one family: points ``(x, y, name)`` from left to right, and a remark about the end."""

    title: str
    points: list[tuple[float, float, str]]
    end: str = ""


@dataclass
class Plot:
    """One figure: a panel for each family, all on the same axes.

    Attributes:
        title: Above all panels.
        x: Label of the axis, always logarithmic.
        y: Label of the other axis.
        growth: Whether points are one model's at growing size, joined by lines, on logarithmic axes both.
        ticks: Where the x axis is labelled; where matplotlib likes if empty.
        curves: By family, in their order.
    """

    title: str
    x: str
    y: str
    growth: bool
    ticks: list[int]
    curves: list[Curve] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """Of everything that is drawn."""
        shown = [VERSION, self.title, self.x, self.y, self.ticks, [vars(c) for c in self.curves]]
        return hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def plots(root: Path) -> dict[Path, Plot]:
    """Return the plots that the committed measurements of a repository allow, by file."""
    path = root / RESOLUTION
    if not path.exists():
        return {}
    data = json.loads(path.read_text())
    m, folder = data["machine"], root / FOLDER
    where = f"{m['device']}, {m['threads']} threads, torch {m['torch']}, {m['date']}"
    rows = [row for row in data["rows"] if row["device"] == "cpu" and row["direction"] == "forward"]
    found = {}
    for name, value, y in (
        ("throughput", "images_per_s", "images a second"),
        ("memory", "peak_mb", "peak memory beyond the weights, MB"),
    ):
        plot = Plot(
            f"{y[0].upper()}{y[1:]}, one image at a time, fp32\n{where}", "side of the image, pixels", y, True, []
        )
        plot.curves = list(_by_resolution(rows, value))
        plot.ticks = sorted({int(x) for c in plot.curves for x, _, _ in c.points if (x / 256).is_integer() or x == 224})
        if plot.curves:
            found[folder / f"{name}.svg"] = plot
    title = f"Accuracy as published, speed as measured: one image at a time, each model at its own size, fp32\n{where}"
    plot = Plot(title, "images a second", "ImageNet-1K top-1 as reported, %", False, [])
    plot.curves = list(_accuracy(root, rows))
    if plot.curves:
        found[folder / "accuracy.svg"] = plot
    return found


def _by_resolution(rows: list[dict[str, Any]], value: str) -> Iterator[Curve]:
    for name in dict.fromkeys(row["model"] for row in rows):
        own = sorted((row for row in rows if row["model"] == name), key=lambda row: row["size"])
        points = [(float(row["size"]), float(row[value]), "") for row in own if row[value]]
        if len(points) < 2:  # measured for its accuracy alone
            continue
        points[0], points[-1] = ((x, y, _short(y)) for x, y, _ in (points[0], points[-1]))
        stopped = [row["stopped"].partition(":")[0] for row in own if row["stopped"]]
        yield Curve(f"{own[0]['family']}: {name}", points, f"then out of {stopped[0]}" if stopped else "")


def _accuracy(root: Path, rows: list[dict[str, Any]]) -> Iterator[Curve]:
    tables = cards.Tables(root)
    speed = {(row["model"], row["size"]): row["images_per_s"] for row in rows if row["images_per_s"]}
    for card in cards.read(root):
        points = []
        for variant in filter(own_accuracy, card.variants):
            fast = speed.get((variant["model"], tables.size(variant)["size"][0]))
            if fast:
                points.append((fast, float(variant["top1"]), variant["model"]))
        points.sort()
        if points:
            ends = (points[0][2], points[-1][2])
            yield Curve(card.front["family"], [(x, y, name if name in ends else "") for x, y, name in points])


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def fresh(path: Path, plot: Plot) -> bool:
    """Whether a file shows what ``plot`` would."""
    found = re.search(r"digest ([0-9a-f]{64})", path.read_text()) if path.exists() else None
    return found is not None and found[1] == plot.digest


def draw(plot: Plot) -> str:
    """Return a plot as SVG, the same text every time.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require("matplotlib", "The plots of measurements", "visionattn[train]")
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter, ScalarFormatter

    style: Any = {"svg.hashsalt": "visionattn", "svg.fonttype": "none", "font.size": 8.5, "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(style):
        lines = -(-len(plot.curves) // COLUMNS)
        figure = Figure(figsize=(11, 1.1 + 2.3 * lines), layout="constrained")
        panels = figure.subplots(lines, min(COLUMNS, len(plot.curves)), sharex=True, sharey=True, squeeze=False)
        for panel in panels.flat[len(plot.curves) :]:
            panel.set_visible(False)
        for i, (panel, own) in enumerate(zip(panels.flat, plot.curves, strict=False)):
            for curve in plot.curves:
                if plot.growth and curve is not own:
                    panel.plot(*_axes(curve), color=GREY, linewidth=0.8, zorder=1)
                elif curve is not own:
                    panel.plot(*_axes(curve), color=GREY, linewidth=0, marker="o", markersize=2.5, zorder=1)
            panel.plot(*_axes(own), color=INK, linewidth=1.8 * plot.growth, marker="o", markersize=4, zorder=3)
            panel.set_title(own.title, loc="left", fontsize=9, fontweight="bold")
            panel.set_xscale("log")
            if plot.growth:
                panel.set_yscale("log")
                panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            if plot.ticks:
                panel.set_xticks(plot.ticks)
            panel.xaxis.set_major_formatter(ScalarFormatter())
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.tick_params(
                axis="x", labelbottom=i + COLUMNS >= len(plot.curves), labelrotation=45 if plot.ticks else 0
            )
            panel.grid(True, color="#eeeeee", linewidth=0.6, zorder=0)
            panel.spines[["top", "right"]].set_visible(False)
            panel.margins(x=0.12, y=0.15)
            _label(panel, own)
        figure.suptitle(plot.title, x=0.01, ha="left", fontsize=10)
        figure.supxlabel(plot.x, fontsize=9)
        figure.supylabel(plot.y, fontsize=9)
        out = io.StringIO()
        figure.savefig(
            out, format="svg", facecolor="white", metadata={"Date": None, "Description": f"digest {plot.digest}"}
        )
    return out.getvalue()


def _axes(curve: Curve) -> tuple[list[float], list[float]]:
    return [x for x, _, _ in curve.points], [y for _, y, _ in curve.points]


def _label(panel: Any, curve: Curve) -> None:
    """Write next to the points that have a name, on white so that grey lines do not cross the letters."""
    middle = math.sqrt(math.prod(panel.get_xlim()))
    ys = [y for _, y, _ in curve.points]
    for i, (x, y, name) in enumerate(curve.points):
        if not name:
            continue
        last = i == len(ys) - 1
        text = f"{name}\n{curve.end}" if last and curve.end else name
        # On the side of the point on which the curve does not run.
        below = len(ys) > 1 and ((i == 0 and ys[1] > y) or (last and ys[-2] > y))
        panel.annotate(
            text, (x, y), xytext=(0, -6 if below else 6), textcoords="offset points", fontsize=8, color="#003a5c",
            ha="right" if x > middle else "left", va="top" if below else "bottom", zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
        )  # fmt: skip
