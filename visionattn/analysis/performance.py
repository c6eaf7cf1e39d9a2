"""The README's tables of speed and memory, made from committed measurements."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from visionattn.analysis.cards import TABLE

OPERATORS = "benchmarks/ops_cpu.json"
MODELS = "benchmarks/models_cpu.json"
GPUS = ("benchmarks/h100.json", "benchmarks/h200.json")

Row = dict[str, Any]


def render(root: Path, text: str) -> str:
    """Return a text with the tables between its ``<!-- table: name -->`` and ``<!-- end -->`` made anew."""
    tables = {"operators": operators, "models": models}

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
        yield f"{_where(data)}. Rows: `{path.relative_to(root)}`, by `python tools/benchmark.py ops`."
        yield "Ratios are medians of interleaved rounds: the smallest and the largest over the shapes of the models at"
        yield "224 pixels and in detection. Memory is what a call holds beyond its inputs."
    if not any((root / name).exists() for name in GPUS):
        yield ""
        yield "On a GPU: not run yet. `python tools/benchmark.py ops --device cuda --out benchmarks/h100.json` checks"
        yield "every kernel there and then measures."


def models(root: Path) -> Iterator[str]:
    """Whole models: timm's own class against it fused, and this library's against itself on reference operators."""
    data = json.loads((root / MODELS).read_text())
    yield "| model | input | against | times faster (quartiles) |"
    yield "|---|---|---|---|"
    rivals = {_race(row): row["contestant"] for row in reversed(data["rows"])}  # the first of a race
    for row in data["rows"]:
        if row["contestant"] == "visionattn":
            spread = f"{row['speedup']:.2f} ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"
            yield f"| `{row['subject']}` | {row['shape']}, {row['direction']} | {rivals[_race(row)]} | {spread} |"
    yield ""
    yield f"{_where(data)}. Rows: `{MODELS}`, by `python tools/benchmark.py models`."


def _race(row: Row) -> tuple[str, ...]:
    return row["subject"], row["shape"], row["direction"], row["dtype"]


def _span(ratios: list[float]) -> str:
    low, high = min(ratios), max(ratios)
    return f"{low:.1f} to {high:.1f}" if f"{low:.1f}" != f"{high:.1f}" else f"{low:.1f}"


def _where(data: Row) -> str:
    m = data["machine"]
    return f"{m['device']}, {m['threads']} threads, torch {m['torch']}, {m['date']}"
