"""Train recipes side by side: python tools/compare.py configs/cifar10 --data-dir DIR [-- --epochs 2 ...]."""

import sys

from visionattn.train import CompareConfig, TrainConfig, TrainError, compare, parse_config, parse_values


def main() -> int:
    """Run the command line, whose part behind `--` is for training; the exit status is 0, or 1 after an error."""
    argv = sys.argv[1:]
    split = argv.index("--") if "--" in argv else len(argv)
    own, training = argv[:split], argv[split + 1 :]
    if own and not own[0].startswith("-"):
        own = ["--configs", *own]
    try:
        overrides, _ = parse_values(TrainConfig, training, "Arguments of training for every run.")
        compare(parse_config(CompareConfig, own, "Train recipes side by side on equal terms."), overrides)
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
