"""Train a detector or segmenter: python tools/train_dense.py configs/bccd/retinanet_biformer_t_bccd.py [--amp ...]."""

import sys

from visionattn.dense.cli import load, parser, report
from visionattn.dense.run import train


def main() -> None:
    """Run the command line."""
    arguments = parser("Train a config of mmdetection or mmsegmentation.")
    arguments.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the work directory")
    arguments.add_argument("--amp", action="store_true", help="mixed precision (GPU)")
    args = arguments.parse_args()
    train(load(args), resume=args.resume, amp=args.amp, check=not args.no_check)


if __name__ == "__main__":
    sys.exit(report(main))
