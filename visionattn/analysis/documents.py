"""Tables of the pages in docs/, made from the front matter of the model cards and from committed measurements."""

import importlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from visionattn.analysis import cards, exports, performance
from visionattn.ops._crossovers import CROSSOVERS
from visionattn.ops._ranks import RANKS

EXPORTS = "benchmarks/exports.json"
BUDGETS = (1.5, 3, 5, 8, 12, 20)  # GMACs of an image
PARAGRAPH = "\n\n"
PLACES = 3  # models to list for each
CONFIG = re.compile(r"(?P<head>[a-z0-9-]+?)_(?P<backbone>.+?)_(?:fpn_)?(?P<schedule>\dx(?:-ms)?|\d+k)_(?P<data>.+)")

Row = dict[str, Any]


def pages(root: Path) -> list[Path]:
    """Return the pages of the repository's docs, by name."""
    return sorted((root / "docs").rglob("*.md"))


def render(root: Path, page: Path, text: str) -> str:
    """Return the text of a page with its tables, as in the model cards, made anew."""

    def table(match: re.Match[str]) -> str:
        lines = TABLES[match[2]](root, page)
        return match[1] + "\n".join(lines) + "\n" + match[3]

    return cards.TABLE.sub(table, text)


def families(root: Path, page: Path) -> Iterator[str]:
    """One row a model card."""
    yield "| family | models | params M, counted | top-1 %, reported | licence of the weights |"
    yield "|---|---|---|---|---|"
    tables = cards.Tables(root)
    for card in cards.read(root):
        names = dict.fromkeys(v["model"] for v in card.variants)
        params = [tables.size(v)["params"] / 1e6 for v in card.variants]
        top1 = [v["top1"] for v in card.variants if v.get("top1") is not None]
        cells = [
            f"[{card.front['family']}](../../model_cards/{card.path.name})",
            str(len(names)),
            _span([f"{p:.1f}" for p in params]),
            _span([str(t) for t in top1]) if top1 else "not recorded",
            _licence(card),
        ]
        yield f"| {' | '.join(cells)} |"


def classification(root: Path, page: Path) -> Iterator[str]:
    """The most accurate models, as reported, up to some costs."""
    yield "| up to GMACs | model | top-1 %, reported | image | params M | GMACs | licence of the weights |"
    yield "|---|---|---|---|---|---|---|"
    tables = cards.Tables(root)
    known = []
    for card in cards.read(root):
        known += [(v, tables.size(v), _licence(card)) for v in _plain(card, any_size=True)]
    for budget in BUDGETS:
        within = [entry for entry in known if entry[1]["macs"] <= budget * 1e9]
        best = sorted(within, key=lambda entry: (-entry[0]["top1"], entry[1]["macs"]))[:PLACES]
        for v, size, licence in best:
            cells = [f"{budget:g}", f"`{v['model']}`", str(v["top1"]), f"{size['size'][0]} x {size['size'][1]}"]
            cells += [f"{size['params'] / 1e6:.1f}", f"{size['macs'] / 1e9:.2f}", licence]
            yield f"| {' | '.join(cells)} |"
    yield ""
    yield f"The {PLACES} best under each cost, of models trained on ImageNet-1K alone. Accuracies are the authors' or,"
    yield "where a card says so, accounts of them by others; none is measured here. Counted: see the cards."


def detection(root: Path, page: Path) -> Iterator[str]:
    """Detectors on COCO that no cheaper one of the same kind equals, as reported."""
    yield "| detector | schedule | backbone | box AP | mask AP | params M | GMACs |"
    yield "|---|---|---|---|---|---|---|"
    for r, match, size in _front(root, "coco/", "box_ap"):
        cells = [match["head"], match["schedule"], _config(r, match), str(r["box_ap"]), str(r.get("mask_ap", ""))]
        yield f"| {' | '.join([*cells, *_cost(size)])} |"
    yield ""
    yield "Reported by the authors, on COCO val2017; none is measured here. Of one detector and schedule, a row is more"
    yield "accurate than all that cost less. Counted at 800 x 1280 by `python tools/flops.py configs`."


def segmentation(root: Path, page: Path) -> Iterator[str]:
    """Segmenters on ADE20K that no cheaper one of the same kind equals, as reported."""
    yield "| head | updates | backbone | crop | mIoU % | params M | GMACs | of an image |"
    yield "|---|---|---|---|---|---|---|---|"
    for r, match, size in _front(root, "ade20k/", "miou"):
        crop = match["data"].partition("-")[2].replace("x", " x ")
        cells = [match["head"], match["schedule"], _config(r, match), crop, str(r["miou"])]
        image = f"{size['size'][0]} x {size['size'][1]}"
        yield f"| {' | '.join([*cells, *_cost(size), image])} |"
    yield ""
    yield "Reported by the authors, at one scale on ADE20K val; none is measured here. Of one head, schedule and image,"
    yield "a row is more accurate than all that cost less. Counted by `python tools/flops.py configs`."


def latency(root: Path, page: Path) -> Iterator[str]:
    """Whole models, one image at a time, the quickest first."""
    top1 = {v["model"]: v["top1"] for card in cards.read(root) for v in _plain(card)}
    for name in cards.MODEL_SPEED:
        if not (root / name).exists():
            yield "Elsewhere: not measured yet."
            continue
        data = json.loads((root / name).read_text())
        rows = [r for r in data["rows"] if r["contestant"] == "visionattn" and r["shape"] == "224x224, batch 1"]
        yield "| model | ms an image of 224 x 224 | memory beyond weights and input, MB | top-1 %, reported |"
        yield "|---|---|---|---|"
        for r in sorted((r for r in rows if r["direction"] == "forward"), key=lambda r: r["ms"]):
            accuracy = top1.get(r["subject"], "not recorded")
            yield f"| `{r['subject']}` | {r['ms']:.1f} | {r['peak_mb']:.0f} | {accuracy} |"
        yield ""
        yield f"{performance.where(data)}, {rows[0]['dtype']}. Rows: `{name}`, by `python tools/benchmark.py models`."
        yield ""


def implementations(root: Path, page: Path) -> Iterator[str]:
    """What an operator's implementations do, by the first sentences of their modules, in the order of `auto`."""
    operator = page.stem
    known = importlib.import_module(f"visionattn.ops.{operator}").IMPLS
    yield "| `impl` | how |"
    yield "|---|---|"
    for name, module in known.items():
        yield f"| `{name}` | {' '.join((module.__doc__ or '').partition(PARAGRAPH)[0].split())} |"
    for (what, device, dtype), crossover in CROSSOVERS.items():
        if what.startswith(f"{operator}: "):
            count, _, ways = what.partition(": ")[2].partition("; ")
            first, _, second = ways.partition(", ")
            where = f"`{device}`" if dtype is None else f"`{device}` in {dtype}"
            yield ""
            yield f"On {where}, by {count}: up to {crossover.upto:g} {first}, above it {second} ({crossover.source})."
    for (name, device, dtype), rows in RANKS.items():
        if name == operator:
            yield ""
            yield f"On `{device}` in {dtype}, `auto` tries, by elements of the queries:"
            yield ""
            for row in rows:
                size = "beyond" if row.upto is None else f"up to {row.upto}"
                yield f"- {size}: {', '.join(f'`{impl}`' for impl in row.order)}"


def measured(root: Path, page: Path) -> Iterator[str]:
    """What was measured of one operator, shape by shape."""
    found = False
    for name in (performance.OPERATORS, *performance.GPUS):
        if not (root / name).exists():
            continue
        data = json.loads((root / name).read_text())
        rows = [r for r in data["rows"] if r["subject"] == page.stem]
        races = {(r["shape"], r["dtype"], r["direction"], r["contestant"]): r for r in rows}
        shapes = dict.fromkeys((r["shape"], r["dtype"]) for r in rows)
        if not shapes:
            continue
        found = True
        yield "| shape | forward, ms | times faster | with backward, ms | times faster | memory there, times less |"
        yield "|---|---|---|---|---|---|"
        for shape, dtype in shapes:
            cells = [f"{shape}, {dtype}"]
            for direction in ("forward", "forward+backward"):
                ours = races.get((shape, dtype, direction, "visionattn"))
                cells += [f"{ours['ms']:.2f}", f"{ours['speedup']:.1f}"] if ours else ["", ""]
            there = races.get((shape, dtype, "forward+backward", "published"))
            cells.append(f"{there['peak_mb'] / ours['peak_mb']:.1f}" if ours and there and ours["peak_mb"] else "")
            yield f"| {' | '.join(cells)} |"
        yield ""
        yield f"Against the authors' formulation, on {performance.where(data)}. Rows: `{name}`,"
        yield f"by `python tools/benchmark.py ops {page.stem}`."
        yield ""
    if not found:
        yield "Not measured."


def exported(root: Path, page: Path) -> Iterator[str]:
    """How many models of each family were exported to each format, and what stopped the others."""
    data = json.loads((root / EXPORTS).read_text())
    rows = data["rows"]
    yield f"| family | {' | '.join(_form(*kind) for kind in exports.KINDS)} |"
    yield f"|---|{'---|' * len(exports.KINDS)}"
    for card in cards.read(root):
        names = {v["model"] for v in card.variants}
        cells = []
        for kind in exports.KINDS:
            tried = [r for r in rows if r["model"] in names and (r["format"], r["dynamic"]) == kind]
            cells.append(f"{sum(not r['stopped'] for r in tried)} of {len(tried)}" if tried else "not tried")
        yield f"| {card.front['family']}, {len(names)} models | {' | '.join(cells)} |"
    written = [r for r in rows if not r["stopped"]]
    versions = data["machine"]
    yield ""
    worst = max(r["largest_error"] for r in written)
    yield "Models whose file was written and computes what the model does, of those tried; in all"
    yield f"{len(written)} files, the largest error {worst:.0e} of the largest value."
    yield f"Random weights, torch {versions['torch']}, timm {versions['timm']}, by `python tools/check_exports.py`,"
    yield f"{versions['date']}."
    reasons: dict[tuple[str, str], list[str]] = {}
    for r in rows:
        if r["stopped"]:
            reasons.setdefault((_form(r["format"], r["dynamic"]), r["stopped"]), []).append(f"`{r['model']}`")
    for (form, why), models in sorted(reasons.items()):
        yield ""
        yield f"{form}: {', '.join(models)}: {why}."


TABLES: dict[str, Callable[[Path, Path], Iterator[str]]] = {
    table.__name__: table
    for table in (families, classification, detection, segmentation, latency, implementations, measured, exported)
}


def _front(root: Path, folder: str, metric: str) -> list[tuple[Row, re.Match[str], Row]]:
    """Results in a folder of configs by kind and cost, without those that a cheaper one of their kind equals."""
    tables = cards.Tables(root)
    found = []
    for card in cards.read(root):
        for r in card.results:
            match = CONFIG.fullmatch(r["config"].removeprefix(folder))
            if r["config"].startswith(folder) and match is not None:
                found.append((r, match, tables.detector(r)))
    found.sort(key=lambda f: (*_kind(f[1], f[2]), f[2]["macs"], f[2]["params"], -f[0][metric]))
    best: dict[tuple[Any, ...], float] = {}
    kept = []
    for r, match, size in found:
        kind = _kind(match, size)
        if r[metric] > best.get(kind, 0.0):
            best[kind] = r[metric]
            kept.append((r, match, size))
    return kept


def _kind(match: re.Match[str], size: Row) -> tuple[Any, ...]:
    return match["head"], match["schedule"], *size["size"]


def _config(result: Row, match: re.Match[str]) -> str:
    return f"[{match['backbone']}](../configs/{result['config']}.py)"


def _cost(size: Row) -> list[str]:
    macs = size["macs"] / 1e9
    return [f"{size['params'] / 1e6:.0f}", f"{macs:.0f}" if macs else "not counted"]


def _form(format: str, dynamic: str) -> str:
    return f"`{format}`" + (", H and W open" if dynamic == "batch,size" else "")


def _plain(card: cards.Card, any_size: bool = False) -> Iterator[Row]:
    """Variants of reported accuracy as registered: no other arguments, no other training data."""
    for v in card.variants:
        if v.get("top1") is not None and not {"weights", "kwargs"} & set(v) and (any_size or "size" not in v):
            yield v


def _span(numbers: list[str]) -> str:
    low, high = min(numbers, key=float), max(numbers, key=float)
    return low if low == high else f"{low} to {high}"


def _licence(card: cards.Card) -> str:
    weights = card.front["weights"]
    return "none published" if weights["where"].startswith("none") else weights["licence"].partition(" (")[0]
