"""Model cards: what their front matter says, and the tables in them, made from it and from committed measurements."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from visionattn.analysis import flops

SIZES, DETECTORS = "benchmarks/flops.json", "benchmarks/flops_dense.json"
PARITY = "benchmarks/parity.json"
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
        self.detectors = {row["model"]: row for row in json.loads((root / DETECTORS).read_text())}
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

    def _variants(self, front: dict[str, Any]) -> Iterator[str]:
        yield "| model | image | params M, counted | published | GMACs, counted | published | top-1 %, reported |"
        yield "|---|---|---|---|---|---|---|"
        notes: dict[str, int] = {}
        for v in front["variants"]:
            row = self.size(v)
            name = f"`{v['model']}`" + "".join(f", `{k}={value}`" for k, value in v.get("kwargs", {}).items())
            cells = [name, f"{row['size'][0]} x {row['size'][1]}"]
            for what, unit in (("params", 1e6), ("macs", 1e9)):
                value, published = row[what] / unit, v.get(what)
                mark = ""
                if published is not None and not agrees(value, published):
                    mark = f" [{notes.setdefault(_why(front, v, what), len(notes) + 1)}]"
                counted = f"{value:.3f}" if value < 1 else f"{value:.2f}"
                cells += [counted, "not recorded" if published is None else f"{published}{mark}"]
            top1 = v.get("top1")
            cells.append(
                "not recorded" if top1 is None else f"{top1}" + (f", {v['weights']}" if "weights" in v else "")
            )
            yield f"| {' | '.join(cells)} |"
        yield ""
        yield f"Published and reported by: {front['reported']['from']} ({front['reported']['set']}). Counted by"
        yield "`python tools/flops.py cards`: multiply-adds of convolutions, matrix products and attention."
        for why, number in notes.items():
            yield ""
            yield f"[{number}] {why[0].upper()}{why[1:]}."

    def _dense(self, front: dict[str, Any]) -> Iterator[str]:
        rows = front.get("dense", {}).get("results")
        if not rows:
            yield "Results of the authors: not recorded."
            return
        yield "| config | box AP | mask AP | mIoU % | params M, counted | published | GMACs, counted | published |"
        yield "|---|---|---|---|---|---|---|---|"
        for r in rows:
            path = f"configs/{r['config']}.py"
            row = self.detectors[path]
            cells = [f"[{path.rpartition('/')[2][:-3]}](../{path})"]
            cells += [str(r.get(k, "")) for k in ("box_ap", "mask_ap", "miou")]
            for what, unit, form in (("params", 1e6, ".1f"), ("macs", 1e9, ".0f")):
                cells += [format(row[what] / unit, form), str(r.get(what, "not recorded"))]
            yield f"| {' | '.join(cells)} |"
        yield ""
        yield f"Reported by: {front['dense']['from']}. AP is on COCO val2017, mIoU at one scale on ADE20K val; none is"
        yield "measured here. Counted by `python tools/flops.py configs`: 800 x 1280 for COCO, 512 x 2048 for ADE20K."

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


def _why(front: Mapping[str, Any], variant: Mapping[str, Any], what: str) -> str:
    """Return why a count differs from what was published; a card must say so."""
    key = f"why_{what}"
    why = variant.get(key, front.get(key))
    if why is None:
        raise ValueError(f"{variant['model']}: counted and published {what} differ, and the card has no {key}")
    return str(why).strip().rstrip(".")


def _key(row: Mapping[str, Any]) -> str:
    return json.dumps([row["model"], row["kwargs"], list(row["size"])], sort_keys=True)
