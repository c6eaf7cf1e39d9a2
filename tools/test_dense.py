"""Evaluate a detector or segmenter: python tools/test_dense.py CONFIG CHECKPOINT [--show-dir pictures]."""

import sys

from visionattn.dense.cli import load, parser, report
from visionattn.dense.run import evaluate


def main() -> None:
    """Run the command line."""
    arguments = parser("Evaluate what tools/train_dense.py trained.")
    arguments.add_argument("checkpoint", help="what training wrote")
    arguments.add_argument("--show-dir", help="write pictures of all predictions there")
    args = arguments.parse_args()
    metrics = evaluate(load(args), args.checkpoint, show_dir=args.show_dir, check=not args.no_check)
    print("  ".join(f"{name} {value:.4g}" for name, value in metrics.items()) or "no metrics: nothing was predicted")


if __name__ == "__main__":
    sys.exit(report(main))
