"""Count parameters and multiply-adds: `python tools/flops.py NAME`, `... all --json FILE`, `... --config FILE`."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from visionattn.analysis import cards, dense_flops, flops
from visionattn.extras import MissingExtraError

ROOT = Path(__file__).parents[1]
LINE = "{:62} {:>11} {:>12} {:>12}  {}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    text = "registered names, `all`, or what the cards list: `cards` (classifiers), `configs` (detectors, segmenters)"
    parser.add_argument("models", nargs="*", help=text)
    parser.add_argument("--config", nargs="+", default=[], help="configs of detectors and segmenters")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of the image; what a model is made for")
    parser.add_argument("--json", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    size = tuple(args.size) if args.size else None
    if bool(args.models) == bool(args.config):
        parser.error("give names of models, `all`, `cards`, `configs`, or --config and a file")
    rows = []
    print(LINE.format("model", "size", "params M", "GMACs", "share of the GMACs"))
    try:
        for row in _rows(args.models, args.config, size):
            rows.append(row)
            shares = ", ".join(f"{k} {v / row.macs:.1%}" for k, v in row.by_kind.items())
            label = f"{row.model} {row.kwargs or ''}"
            at = f"{row.size[0]}x{row.size[1]}"
            print(LINE.format(label, at, f"{row.params / 1e6:.3f}", f"{row.macs / 1e9:.3f}", shares), flush=True)
    except (ValueError, FileNotFoundError, MissingExtraError) as e:
        parser.error(str(e))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text("[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n")


def _rows(models: list[str], configs: list[str], size: tuple[int, int] | None) -> Iterator[flops.Row]:
    if models == ["cards"]:
        return cards.counted(ROOT)
    if models == ["configs"]:
        return cards.counted_configs(ROOT)
    if configs:
        return (dense_flops.count_config(path, size) for path in configs)
    names = flops.model_names() if models == ["all"] else models
    return (flops.count(name, size) for name in names)


if __name__ == "__main__":
    main()
