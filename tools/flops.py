"""Count parameters and multiply-adds: `python tools/flops.py biformer_s [--size H W]`, `python tools/flops.py all`."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from visionattn.analysis import cards, flops

LINE = "{:62} {:>11} {:>12} {:>12}  {}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="registered names, `all`, or `cards`: what the model cards list")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of the image; what a model is made for")
    parser.add_argument("--json", type=Path, help="write the rows as JSON")
    args = parser.parse_args()
    size = tuple(args.size) if args.size else None
    if not args.models:
        parser.error("give a model's name, `all` or `cards`")
    rows = []
    print(LINE.format("model", "size", "params M", "GMACs", "share of the GMACs"))
    try:
        for row in _rows(args.models, size):
            rows.append(row)
            shares = ", ".join(f"{k} {v / row.macs:.1%}" for k, v in row.by_kind.items())
            label = f"{row.model} {row.kwargs or ''}"
            at = f"{row.size[0]}x{row.size[1]}"
            print(LINE.format(label, at, f"{row.params / 1e6:.3f}", f"{row.macs / 1e9:.3f}", shares), flush=True)
    except ValueError as e:
        parser.error(str(e))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text("[\n" + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]\n")


def _rows(models: list[str], size: tuple[int, int] | None) -> Iterator[flops.Row]:
    if models == ["cards"]:
        return cards.counted(Path(__file__).parents[1])
    names = flops.model_names() if models == ["all"] else models
    return (flops.count(name, size) for name in names)


if __name__ == "__main__":
    main()
