"""Draw predictions on validation images with the regions that BiFormer routed to."""

import argparse
import sys
from pathlib import Path

import torch

from visionattn.analysis.routing import draw_routing
from visionattn.train import TrainError
from visionattn.train.samples import validation_samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="weights that tools/train.py wrote")
    parser.add_argument("--data-dir", help="the data set's folder, if it has moved since training")
    parser.add_argument("--count", type=int, default=10, help="images to draw, spread over the validation set")
    parser.add_argument("--out", type=Path, default=Path("routing.png"))
    args = parser.parse_args()
    try:
        samples = validation_samples(args.checkpoint, count=args.count, data_dir=args.data_dir)
        figure = draw_routing(
            samples.model, samples.inputs, samples.images, class_names=samples.class_names, labels=samples.labels
        )
    except (TrainError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
