"""Write the tables of README, docs and model cards, and the plots: python tools/make_tables.py [--check]."""

import argparse
import sys
from pathlib import Path

from visionattn.analysis import cards, documents, performance, plots

ROOT = Path(__file__).parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if a table or plot is out of date"
    )
    args = parser.parse_args()
    tables = cards.Tables(ROOT)
    stale = {card.path: text for card in cards.read(ROOT) if (text := tables.render(card)) != card.text}
    readme = ROOT / "README.md"
    if (text := performance.render(ROOT, readme.read_text())) != readme.read_text():
        stale[readme] = text
    for page in documents.pages(ROOT):
        if (text := documents.render(ROOT, page, page.read_text())) != page.read_text():
            stale[page] = text
    for path, text in stale.items():
        print(f"{'out of date' if args.check else 'wrote'}: {path.relative_to(ROOT)}")
        if not args.check:
            path.write_text(text)
    old = {path: plot for path, plot in plots.plots(ROOT).items() if not plots.fresh(path, plot)}
    for path, plot in old.items():
        print(f"{'out of date' if args.check else 'wrote'}: {path.relative_to(ROOT)}")
        if not args.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(plots.draw(plot))
    return 1 if args.check and (stale or old) else 0


if __name__ == "__main__":
    sys.exit(main())
