"""Export models in every format, compare each file with its model, and keep a row of what came out.

The rows in benchmarks/exports.json come from `python tools/check_exports.py NAMES --out benchmarks/exports.json`; a run
that was stopped goes on from the rows that the file holds, on any machine and day with the same versions.
"""

import argparse
import sys
from pathlib import Path

import timm

from visionattn.analysis import bench, cards, exports

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "export.py"


def main() -> int:
    """Run the command line; the exit status is 1 if something was not exported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="registered names, or `all` that have a card")
    parser.add_argument("--format", nargs="+", choices=dict.fromkeys(f for f, _ in exports.KINDS), help="all if none")
    parser.add_argument("--dynamic", nargs="+", choices=dict.fromkeys(d for _, d in exports.KINDS), help="all if none")
    parser.add_argument("--limit", type=float, default=900, help="seconds after which an export is stopped")
    parser.add_argument("--jobs", type=int, default=1, help="how many run at once")
    parser.add_argument("--out", type=Path, help="write the rows as JSON; what it holds already is not made again")
    args = parser.parse_args()
    known_by_cards = (variant["model"] for card in cards.read(ROOT) for variant in card.variants)
    names = list(dict.fromkeys(known_by_cards)) if args.models == ["all"] else args.models
    unknown = [name for name in names if not timm.is_model(name)]
    if unknown:
        parser.error(f"no model is named {', '.join(unknown)}; timm.list_models() lists them, after import visionattn")
    kinds = [
        (f, d) for f, d in exports.KINDS
        if (args.format is None or f in args.format) and (args.dynamic is None or d in args.dynamic)
    ]  # fmt: skip
    where = {key: said for key, said in bench.machine("cpu").items() if key in (*exports.SAME, "date")}
    try:
        known = bench.read(args.out, where, same=exports.SAME)["rows"] if args.out else []
    except ValueError as e:
        parser.error(str(e))
    rows = []
    for row in exports.survey(TOOL, names, kinds, known=known, limit_s=args.limit, jobs=args.jobs):
        rows.append(row)
        if args.out:  # after every row: a run that is stopped keeps what it made
            bench.write(args.out, where, rows, append=True, keys=exports.KEYS, same=exports.SAME)
    return int(any(row.stopped for row in rows))


if __name__ == "__main__":
    sys.exit(main())
