"""The README's tables of speed and memory, made from committed measurements."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from visionattn.analysis import plots, scaling
from visionattn.analysis.cards import TABLE

OPERATORS = "benchmarks/ops_cpu.json"
MODELS = "benchmarks/models_cpu.json"
COMPARISONS = "cifar10*.json"
GPUS = ("benchmarks/h100.json", "benchmarks/h200.json")

Row = dict[str, Any]


def render(root: Path, text: str) -> str:
    """Return a text with the tables between its ``<!-- table: name -->`` and ``<!-- end -->`` made anew."""
    tables = {
        "operators": operators, "models": models, "resolution": resolution, "train": train, "families": families,
    }  # fmt: skip

    def table(match: re.Match[str]) -> str:
        return match[1] + "\n".join(tables[match[2]](root)) + "\n" + match[3]

    return TABLE.sub(table, text)


def operators(root: Path) -> Iterator[str]:
    """Each operator against its authors' formulation, over all measured shapes: the least and the largest ratio."""
    files = [root / OPERATORS, *(root / name for name in GPUS)]
    measured = [(path, json.loads(path.read_text())) for path in files if path.exists()]
    for path, data in measured:
        yield "| operator | shapes | forward, times faster | forward and backward | extra memory there, times less |"
        yield "|---|---|---|---|---|"
        for name in dict.fromkeys(row["subject"] for row in data["rows"]):
            rows = [row for row in data["rows"] if row["subject"] == name]
            ours = [row for row in rows if row["contestant"] == "visionattn"]
            there = {_race(row): row for row in rows if row["contestant"] == "published"}
            cells = [f"`{name}`", str(len({row["shape"] for row in ours}))]
            cells += [
                _span([row["speedup"] for row in ours if row["direction"] == direction])
                for direction in ("forward", "forward+backward")
            ]
            both = [row for row in ours if row["direction"] == "forward+backward" and row["peak_mb"]]
            cells.append(_span([there[_race(row)]["peak_mb"] / row["peak_mb"] for row in both]))
            yield f"| {' | '.join(cells)} |"
        yield ""
        yield f"{where(data)}. Rows: `{path.relative_to(root)}`, by `python tools/benchmark.py ops`."
        yield "Ratios are medians of interleaved rounds: the smallest and the largest over the shapes of the models at"
        yield "224 pixels and in detection. Memory is what a call holds beyond its inputs."
    if not any((root / name).exists() for name in GPUS):
        yield ""
        yield "On a GPU: not run yet. `python tools/benchmark.py ops --device cuda --out benchmarks/h100.json` checks"
        yield "every kernel there and then measures."


def models(root: Path) -> Iterator[str]:
    """Whole models: timm's own class against it fused, and this library's against itself on reference operators."""
    data = json.loads((root / MODELS).read_text())
    rivals: dict[str, dict[tuple[str, str], dict[str, str]]] = {}  # what was measured, by rival, model and input
    for row in data["rows"]:
        own, compiled = row["contestant"].partition(", ")[::2]
        if own == "visionattn":
            rival = next(r["contestant"] for r in data["rows"] if _race(r) == _race(row))  # the first of a race
            spread = f"{row['speedup']:.2f} ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"
            how = ", ".join(filter(None, (row["direction"], compiled)))
            cells = rivals.setdefault(rival.partition(", ")[0], {}).setdefault((row["subject"], how), {})
            cells[row["shape"]] = spread
    for rival, measured in rivals.items():
        shapes = sorted({shape for cells in measured.values() for shape in cells}, key=_numbers)
        yield f"| model against {rival} | | {' | '.join(shapes)} |"
        yield "|---" * (len(shapes) + 2) + "|"
        for (model, how), cells in sorted(measured.items()):
            yield f"| `{model}` | {how} | {' | '.join(cells.get(shape, '') for shape in shapes)} |"
        yield ""
    yield "Times faster, with quartiles of the rounds."
    yield f"{where(data)}. Rows: `{MODELS}`, by `python tools/benchmark.py models`."


def resolution(root: Path) -> Iterator[str]:
    """A small model of every family at growing size: images a second and peak memory, and the plots."""
    path = root / plots.RESOLUTION
    if not path.exists():
        yield f"Not measured yet: `python tools/benchmark.py resolution --append --out {plots.RESOLUTION}`."
        return
    data = json.loads(path.read_text())
    rows = {(row["model"], row["size"]): row for row in data["rows"] if row["direction"] == "forward"}
    names = [name for name in scaling.FAMILIES.values() if any(model == name for model, _ in rows)]
    sizes = sorted({size for model, size in rows if model in names})
    yield f"| model | {' | '.join(f'{size}' for size in sizes)} |"
    yield "|---" * (len(sizes) + 1) + "|"
    for name in names:
        yield f"| `{name}` | {' | '.join(_growth(rows.get((name, size))) for size in sizes)} |"
    yield ""
    yield "Images a second, and the most memory held beyond the weights, for one square image of that side in fp32."
    yield f"{where(data)}. Rows: `{plots.RESOLUTION}`, by"
    yield "`python tools/benchmark.py resolution`, which stops a model at a budget of time and memory."
    yield ""
    for file, plot in plots.plots(root).items():
        yield f"![{plot.y} over {plot.x}, a panel a family]({file.relative_to(root)})"


def train(root: Path) -> Iterator[str]:
    """A training step of a small model of every family."""
    path = root / plots.TRAINING
    if not path.exists():
        yield f"Not measured yet: `python tools/benchmark.py train --append --out {plots.TRAINING}`."
        return
    data = json.loads(path.read_text())
    yield "| model | input | images a second | s a step (quartiles) | peak memory, MB |"
    yield "|---|---|---|---|---|"
    for row in data["rows"]:
        spread = " to ".join(f"{row[k] / 1e3:.2f}" for k in ("ms_low", "ms_high"))
        cells = [
            f"`{row['model']}`",
            f"{row['size']}x{row['size']}, batch {row['batch']}",
            f"{row['images_per_s']:.2f}",
        ]
        yield f"| {' | '.join(cells)} | {row['ms'] / 1e3:.2f} ({spread}) | {row['peak_mb']:.0f} |"
    yield ""
    yield "Forward pass, backward pass and AdamW in fp32; memory beyond the weights, when AdamW makes its state."
    yield f"{where(data)}. Rows: `{plots.TRAINING}`, by `python tools/benchmark.py train`."


def families(root: Path) -> Iterator[str]:
    """The families trained side by side, as `tools/compare.py` wrote it beside its results."""
    for path in sorted((root / "benchmarks").glob(COMPARISONS)):
        data = json.loads(path.read_text())
        m, date = data["machine"], max(row["date"] for row in data["rows"])
        yield from path.with_suffix(".md").read_text().splitlines()
        yield ""
        seeds = ", ".join(map(str, sorted({row["seed"] for row in data["rows"]})))
        yield f"{data['label']}. {m['device']}, torch {m['torch']}, {date}; ± is the standard deviation over the"
        yield f"seeds, {seeds}. Rows and recipe: `{path.relative_to(root)}`, by `python tools/compare.py`."
        yield ""
        yield f"![Accuracy of the families against what they cost]({path.with_suffix('.png').relative_to(root)})"


def _growth(row: Row | None) -> str:
    if row is None:
        return ""
    if row["stopped"]:
        return f"out of {row['stopped'].partition(':')[0]}"
    speed = row["images_per_s"]
    memory = row["peak_mb"]
    return f"{speed:.{0 if speed >= 10 else 2}f}/s, " + (
        f"{memory / 1024:.1f} GB" if memory >= 1024 else f"{memory:.0f} MB"
    )


def _race(row: Row) -> tuple[str, ...]:
    return row["subject"], row["shape"], row["direction"], row["dtype"]


def _numbers(shape: str) -> list[int]:
    """Sorts shapes by their sizes, not by their digits."""
    return [int(number) for number in re.findall(r"\d+", shape)]


def _span(ratios: list[float]) -> str:
    low, high = min(ratios), max(ratios)
    return f"{low:.1f} to {high:.1f}" if f"{low:.1f}" != f"{high:.1f}" else f"{low:.1f}"


def where(data: Row) -> str:
    """Machine, versions and date of a file of measurements."""
    m = data["machine"]
    return f"{m['device']}, {m['threads']} threads, torch {m['torch']}, {m['date']}"
