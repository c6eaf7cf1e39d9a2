"""Export a model, run the file and compare it: python tools/export.py biformer_t --format onnx --out FILE."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from timm.utils import ParseKwargs

from visionattn import CheckpointError
from visionattn.analysis import export, quantize
from visionattn.analysis.bench import machine
from visionattn.analysis.folder import FolderError
from visionattn.analysis.subject import Subject, create, settle
from visionattn.extras import MissingExtraError


def main() -> int:
    """Run the command line; the exit status is 0, or 1 after an error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a name of visionattn.list_models() or timm.list_models()")
    parser.add_argument("--format", choices=export.FORMATS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the file; for safetensors a folder, as timm's hub has")
    parser.add_argument("--checkpoint", type=Path, help="the authors' file, or one of tools/train.py")
    parser.add_argument("--use-ema", action="store_true", help="the averaged weights, where the file holds both")
    parser.add_argument("--img-size", type=int, nargs=2, metavar=("H", "W"), help="default: what the model is made for")
    text = "what may differ from image to image: the batch alone, or H and W too (multiples of 32; onnx and pt2)"
    parser.add_argument("--dynamic", choices=["batch", "batch,size"], default="batch", help=text)
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE")
    parser.add_argument("--no-fuse", action="store_true", help="leave timm's own models as they are")
    parser.add_argument("--int8", action="store_true", help="with onnx: also write an 8-bit version, <out>.int8.onnx")
    parser.add_argument("--calibration", type=Path, help="with --int8: a folder of images that set its ranges")
    parser.add_argument("--calibration-images", type=int, default=256, help="how many of them")
    parser.add_argument("--report", type=Path, help="write what was exported, and how far off it is, as JSON")
    parser.add_argument("--eval", type=Path, help="with --int8: class folders of images, for accuracy before and after")
    args = parser.parse_args()
    if args.int8 and (args.format != "onnx" or args.calibration is None):
        parser.error("--int8 takes --format onnx and --calibration FOLDER")
    if not args.int8 and (args.calibration or args.eval):
        parser.error("--calibration and --eval are for --int8")
    size = tuple(args.img_size) if args.img_size else None
    try:
        subject = create(
            args.model, checkpoint=args.checkpoint, size=size, fused=not args.no_fuse, use_ema=args.use_ema,
            **args.model_kwargs,
        )  # fmt: skip
        if args.checkpoint is None:
            print(f"no --checkpoint: {args.model} is exported with random weights", file=sys.stderr)
            settle(subject)
        written = export.export(
            subject.model, args.out, format=args.format, size=subject.size, dynamic_size=args.dynamic == "batch,size",
            card={"data_config": subject.data_config, "label_names": subject.class_names},
        )  # fmt: skip
        print(written)
        if args.report:
            told = {"model": args.model} | asdict(written) | {"path": str(written.path)}
            args.report.write_text(json.dumps(told, indent=1) + "\n")
        if args.int8:
            quantise(args, subject)
    except (
        CheckpointError, FolderError, MissingExtraError, OSError, TypeError, ValueError, export.ExportError,
        quantize.QuantizationError,
    ) as e:  # fmt: skip
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


def quantise(args: argparse.Namespace, subject: Subject) -> None:
    """Write the 8-bit version, and beside it what was measured."""
    result = quantize.quantize_subject(
        subject, args.out, args.out.with_suffix(".int8.onnx"), calibration=args.calibration,
        images=args.calibration_images, evaluation=args.eval,
    )  # fmt: skip
    report = result.path.with_suffix(".json")
    measured = {"model": args.model, "checkpoint": str(args.checkpoint), "machine": machine("cpu")} | result.to_json()
    report.write_text(json.dumps(measured, indent=1) + "\n")
    print(result)
    print(f"wrote {report}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
