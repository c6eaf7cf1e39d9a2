"""Train an image classifier: python tools/train.py configs/digits/biformer_t.yaml [--key value ...]."""

import sys

from visionattn.train import TrainConfig, TrainError, dry_run, parse_config, train


def main() -> int:
    """Run the command line; the exit status is 0, 1 after an error, or 128 + the signal that stopped the run.

    A run that stopped before its `--time-limit` ended in order, with 0.
    """
    try:
        cfg = parse_config(TrainConfig, sys.argv[1:], "Train an image classifier on accelerate and timm.")
        if cfg.dry_run:
            print(dry_run(cfg), end="")
            return 0
        result = train(cfg)
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 128 + result.stopped_by if isinstance(result.stopped_by, int) else 0


if __name__ == "__main__":
    sys.exit(main())
