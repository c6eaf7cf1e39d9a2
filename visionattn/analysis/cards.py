"""Model cards: what their front matter says, and the tables in them, made from it and from committed measurements."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from visionattn.analysis import dense_flops, flops, quantization_study

SIZES, DETECTORS = "benchmarks/flops.json", "benchmarks/flops_dense.json"
PARITY = "benchmarks/parity.json"
QUANTIZATION = "benchmarks/quantization_cpu.json"
MODEL_SPEED = ("benchmarks/models_cpu.json", "benchmarks/models_gpu.json")
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.S)


@dataclass(frozen=True)
class Card:
    """One family's card.

    Attributes:
        path: Its file.
        front: The YAML front matter.
        text: The whole file.
    """

    path: Path
    front: dict[str, Any]
    text: str

    @property
    def variants(self) -> list[dict[str, Any]]:
        """What the authors report of each variant: ``model``, and if it is not the default, ``size`` and ``kwargs``."""
        return self.front["variants"]

    @property
    def results(self) -> list[dict[str, Any]]:
        """What the authors report of detectors and segmenters: ``config`` and figures."""
        return self.front.get("dense", {}).get("results", [])


def read(root: Path) -> list[Card]:
    """Read all cards of the repository at ``root``, by name.

    Raises:
        ValueError: a card has no front matter.
    """
    cards = []
    for path in sorted((root / "model_cards").glob("*.md")):
        text = path.read_text()
        parts = text.split("---\n", 2)
        if len(parts) != 3 or parts[0]:
            raise ValueError(f"{path} must begin with YAML front matter between two lines of '---'")
        cards.append(Card(path, yaml.safe_load(parts[1]), text))
    return cards


def counted(root: Path) -> Iterator[flops.Row]:
    """Count every variant of every card on the meta device."""
    for card in read(root):
        for variant in card.variants:
            yield count(variant)


def counted_configs(root: Path) -> Iterator[flops.Row]:
    """Count every detector and segmenter of every card on the meta device."""
    for card in read(root):
        for result in card.results:
            yield count_config(root, result)


def count_config(root: Path, result: Mapping[str, Any]) -> flops.Row:
    """Count one detector or segmenter of a card."""
    path = f"configs/{result['config']}.py"
    size = tuple(result["size"]) if "size" in result else None
    return replace(dense_flops.count_config(root / path, size), model=path)


def count(variant: Mapping[str, Any]) -> flops.Row:
    """Count one variant of a card."""
    size = (variant["size"], variant["size"]) if "size" in variant else None
    return flops.count(variant["model"], size, **variant.get("kwargs", {}))


def agrees(counted: float, published: float, tolerance: float = 0.02) -> bool:
    """Whether a count is what was published: within ``tolerance`` of it, or equal at the digits that were given."""
    digits = len(str(published).partition(".")[2]) if isinstance(published, float) else 0
    return abs(counted - published) <= max(tolerance * published, 0.5000001 * 10**-digits)


class Tables:
    """Makes the tables of cards from the measurements that are committed in a repository.

    Args:
        root: The repository.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sizes = {_key(row): row for row in json.loads((root / SIZES).read_text())}
        self.parity = json.loads((root / PARITY).read_text())
        rows = json.loads((root / DETECTORS).read_text())
        self.detectors = {(row["model"], tuple(row["size"])): row for row in rows}
        files = [root / name for name in MODEL_SPEED]
        self.speed = [(f.name, json.loads(f.read_text())) for f in files if f.exists()]

    def render(self, card: Card) -> str:
        """Return the text of a card with its tables made anew."""

        def table(match: re.Match[str]) -> str:
            return match[1] + "\n".join(getattr(self, f"_{match[2]}")(card.front)) + "\n" + match[3]

        return TABLE.sub(table, card.text)

    def size(self, variant: Mapping[str, Any]) -> dict[str, Any]:
        """Return the committed count of a variant.

        Raises:
            KeyError: it was not counted.
        """
        native = flops.native_size(variant["model"])
        size = [variant["size"]] * 2 if "size" in variant else list(native)
        return self.sizes[_key({"model": variant["model"], "kwargs": variant.get("kwargs", {}), "size": size})]

    def detector(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Return the committed count of a detector or segmenter.

        Raises:
            KeyError: it was not counted.
        """
        path = f"configs/{result['config']}.py"
        return self.detectors[path, tuple(result.get("size", flops.DENSE_SIZES[path.split("/")[1]]))]

    def _variants(self, front: dict[str, Any]) -> Iterator[str]:
        yield "| model | image | params M, counted | published | GMACs, counted | published | top-1 %, reported |"
        yield "|---|---|---|---|---|---|---|"
        notes = _Notes(front)
        for v in front["variants"]:
            row = self.size(v)
            name = f"`{v['model']}`" + "".join(f", `{k}={value}`" for k, value in v.get("kwargs", {}).items())
            cells = [name, f"{row['size'][0]} x {row['size'][1]}"]
            for what, unit in (("params", 1e6), ("macs", 1e9)):
                value = row[what] / unit
                cells += [f"{value:.3f}" if value < 1 else f"{value:.2f}", notes.published(v, what, value)]
            top1 = v.get("top1")
            cells.append(
                "not recorded" if top1 is None else f"{top1}" + (f", {v['weights']}" if "weights" in v else "")
            )
            yield f"| {' | '.join(cells)} |"
        yield ""
        yield f"Published and reported by: {front['reported']['from']} ({front['reported']['set']}). Counted by"
        yield "`python tools/flops.py cards`: multiply-adds of convolutions, matrix products and attention."
        yield from notes.lines()

    def _dense(self, front: dict[str, Any]) -> Iterator[str]:
        dense = front.get("dense")
        if dense is None:
            yield "Results of the authors: not recorded."
            return
        yield "| config | box AP | mask AP | mIoU % | image | params M, counted | published | GMACs | published |"
        yield "|---|---|---|---|---|---|---|---|---|"
        notes = _Notes(dense)
        for r in dense["results"]:
            row = self.detector(r)
            params, macs = row["params"] / 1e6, row["macs"] / 1e9
            cells = [f"[{r['config'].rpartition('/')[2]}](../configs/{r['config']}.py)"]
            cells += [str(r.get(k, "")) for k in ("box_ap", "mask_ap", "miou")]
            cells += [
                f"{row['size'][0]} x {row['size'][1]}",
                f"{params:.1f}",
                notes.published(r, "params", params, 0.01),
            ]
            cells += [f"{macs:.0f}" if macs else "not counted", notes.published(r, "macs", macs)]
            yield f"| {' | '.join(cells)} |"
        yield ""
        yield f"Reported by: {dense['from']}. AP is on COCO val2017, mIoU at one scale on ADE20K val; none is measured"
        yield "here. Counted by `python tools/flops.py configs`."
        yield from notes.lines()

    def _parity(self, front: dict[str, Any]) -> Iterator[str]:
        yield "| recording of the authors' code | model | inputs | outputs, worst error | gradient norms, worst error |"
        yield "|---|---|---|---|---|"
        for row in self.parity["rows"]:
            if row["case"].split("/")[0] in front["parity"]:
                inputs = ", ".join("x".join(map(str, shape)) for shape in row["inputs"])
                grads = "not recorded" if row["grads"] is None else f"{row['grads']:.0e}"
                yield f"| {row['case']} | `{row['model']}` | {inputs} | {row['outputs']:.0e} | {grads} |"
        machine = self.parity["machine"]
        yield ""
        yield "Measured: errors over the largest recorded value, in fp32, from the official keys, by"
        yield f"`python -m tests.golden` ({machine['device']}, torch {machine['torch']}, {machine['date']})."

    def _quantization(self, front: dict[str, Any]) -> Iterator[str]:
        data = json.loads((self.root / QUANTIZATION).read_text())
        rows, recipe, machine = data["rows"], data["recipe"], data["machine"]
        yield from quantization_study.table(rows)
        yield ""
        where = (
            f"{machine['device']}, torch {machine['torch']}, ONNX Runtime {machine['onnxruntime']}, {machine['date']}"
        )
        trained = f"{rows[0]['epochs']} of {recipe['epochs']} epochs of {data['training_images']} images, one seed"
        ranges = f"ranges of activations from {rows[0]['calibration_images']}"
        yield f"Measured: `{QUANTIZATION}`, by `python tools/quantize_study.py`"
        yield f"({where})."
        yield f"Trained on CIFAR-10 by `configs/quantization`: {trained}."
        yield f"Accuracy on {rows[0]['images']} images, {ranges}."

    def _speed(self, front: dict[str, Any]) -> Iterator[str]:
        names = {v["model"] for v in front["variants"]}
        found = False
        for file, data in self.speed:
            rows = [row for row in data["rows"] if row["subject"] in names]
            if not rows:
                continue
            if found:
                yield ""
            found = True
            yield "| model | input | what runs | direction | ms | speed-up (quartiles) | peak MB |"
            yield "|---|---|---|---|---|---|---|"
            for r in rows:
                spread = f"{r['speedup']:.2f} ({r['speedup_low']:.2f} to {r['speedup_high']:.2f})"
                cells = [f"`{r['subject']}`", f"{r['shape']}, {r['dtype']}", r["contestant"], r["direction"]]
                yield f"| {' | '.join(cells)} | {r['ms']:.1f} | {spread} | {r['peak_mb']:.0f} |"
            m = data["machine"]
            where = f"{m['device']}, {m['threads']} threads, torch {m['torch']}, {m['date']}"
            yield ""
            yield f"Measured: `benchmarks/{file}` ({where})."
        if not found:
            yield "Not measured."


class _Notes:
    """Numbered reasons why counts differ from what was published, under a table.

    Args:
        section: Front matter that holds reasons for all entries: ``why_params``, ``why_macs``.
    """

    def __init__(self, section: Mapping[str, Any]) -> None:
        self.section = section
        self.numbers: dict[str, int] = {}

    def published(self, entry: Mapping[str, Any], what: str, counted: float, tolerance: float = 0.02) -> str:
        """Return the published figure, with the number of a reason if it differs from the count.

        Raises:
            ValueError: they differ, and the card does not say why.
        """
        figure = entry.get(what)
        if figure is None:
            return "not recorded"
        if agrees(counted, figure, tolerance):
            return str(figure)
        why = entry.get(f"why_{what}", self.section.get(f"why_{what}"))
        if why is None:
            name = entry.get("model") or entry["config"]
            raise ValueError(f"{name}: counted and published {what} differ, and the card has no why_{what}")
        return f"{figure} [{self.numbers.setdefault(str(why).strip().rstrip('.'), len(self.numbers) + 1)}]"

    def lines(self) -> Iterator[str]:
        """The reasons."""
        for why, number in self.numbers.items():
            yield ""
            yield f"[{number}] {why[0].upper()}{why[1:]}."


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps([row["model"], row["kwargs"], list(row["size"])], sort_keys=True)
