"""Pascal-VOC XML files to one COCO JSON file: python tools/voc_to_coco.py Annotations out.json."""

import argparse
import sys
from pathlib import Path

from visionattn.dense.cli import report
from visionattn.dense.voc import voc_to_coco


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Convert Pascal-VOC annotations to COCO's format.")
    parser.add_argument("annotations", help="folder of XML files")
    parser.add_argument("out", help="JSON file to write")
    parser.add_argument("--names", type=Path, help="text file of the annotations to take, as in VOC's ImageSets")
    parser.add_argument("--classes", nargs="+", help="class names in the order of their ids, from 1")
    parser.add_argument(
        "--zero-based", action="store_true", help="corners are coordinates from 0, not VOC's pixels from 1"
    )
    args = parser.parse_args()
    names = args.names.read_text().split() if args.names else None
    data = voc_to_coco(args.annotations, args.out, names=names, classes=args.classes, one_based=not args.zero_based)
    print(
        f"{args.out}: {len(data['images'])} images, {len(data['annotations'])} boxes, {len(data['categories'])} classes"
    )


if __name__ == "__main__":
    sys.exit(report(main))
