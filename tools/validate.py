"""Evaluate a checkpoint: python tools/validate.py --checkpoint output/demo/model_best.safetensors."""

import sys

from visionattn.train import TrainError, ValidateConfig, parse_config, validate, validate_table


def main() -> int:
    """Run the command line; the exit status is 0, or 1 after an error."""
    try:
        cfg = parse_config(ValidateConfig, sys.argv[1:], "Evaluate image classifiers.")
        if cfg.sets:
            validate_table(cfg)
            return 0
        result = validate(cfg)
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{result['model']} on {result['dataset']} ({result['split']}, {result['samples']:.0f} images): "
        f"top1 {result['top1']:.2f} %  top5 {result['top5']:.2f} %  loss {result['loss']:.4f}  "
        f"{result['images_per_second']:.0f} img/s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
