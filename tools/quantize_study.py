"""Quantise models that one recipe trained to 8 bits, and tabulate accuracy and outliers.

python tools/compare.py configs/quantization --data-dir DIR --per-class 1000 200 --seeds 0 --output output/quantization
python tools/quantize_study.py output/quantization/*/last.safetensors --data-dir DIR --out benchmarks/quantization_cpu.json
"""  # noqa: E501

import argparse
import sys
from pathlib import Path

import torch

from visionattn import CheckpointError
from visionattn.analysis import quantization_study as study
from visionattn.analysis.export import ExportError
from visionattn.analysis.quantize import QuantizationError
from visionattn.extras import MissingExtraError


def main() -> int:
    """Run the command line; the exit status is 0, or 1 after an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="files that tools/train.py or tools/compare.py wrote")
    parser.add_argument("--data-dir", type=Path, required=True, help="holds train/ (calibration) and val/ (accuracy)")
    parser.add_argument("--calibration-images", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True, help="the .json file of results")
    args = parser.parse_args()
    try:
        rows = []
        for checkpoint in args.checkpoints:
            rows.append(study.examine(checkpoint, args.data_dir, calibration_images=args.calibration_images))
            print("\n".join(study.table(rows)), flush=True)
        study.write(args.out, rows, args.checkpoints[0])
    except (CheckpointError, ExportError, MissingExtraError, OSError, QuantizationError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
