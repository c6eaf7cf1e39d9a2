"""See what a model looks at: python tools/visualize.py MODEL --checkpoint FILE --image PHOTO_OR_FOLDER ... --out DIR.

Writes one page an image, to be opened in any browser, where a click on a patch shows what it attends to, and pictures.
A checkpoint of tools/train.py knows its model, classes and preprocessing; without --image its validation images are
taken. Without a checkpoint the weights are random.
"""

import argparse
import ast
import sys
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, resolve_model_data_config
from torch import nn

import visionattn
from visionattn.analysis import METHODS, Source, as_picture, image_sources, visualize
from visionattn.extras import MissingExtraError
from visionattn.train import TrainError
from visionattn.train.build import build_model
from visionattn.train.checkpoint import WeightsInfo, load_model, load_weights, read_info
from visionattn.train.samples import validation_samples


def main() -> int:
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(description=summary, epilog=rest)
    parser.add_argument("model", nargs="?", help="a registered name; what the checkpoint says, if left out")
    parser.add_argument(
        "--checkpoint", type=Path, help="weights: of tools/train.py, or as their authors published them"
    )
    parser.add_argument("--image", type=Path, nargs="+", metavar="PATH", help="images, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("output/see"), help="folder for pages and pictures")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="M", help=", ".join(METHODS) + "; all")
    parser.add_argument("--layer", nargs="+", metavar="NAME", help="attention layers to show; all")
    parser.add_argument("--cam-layer", metavar="NAME", help="layer of Grad-CAM; the last stage")
    parser.add_argument("--target", type=int, metavar="CLASS", help="class of Grad-CAM; the likeliest two")
    parser.add_argument("--size", type=int, nargs="+", metavar="N", help="of the model's input: a side, or H W")
    parser.add_argument("--num-classes", type=int, help="of a checkpoint of other classes than the model's")
    parser.add_argument("--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help="arguments of the model")
    parser.add_argument("--class-names", type=Path, help="text file, a class a line")
    parser.add_argument("--samples", type=int, default=4, help="validation images to take without --image")
    parser.add_argument("--data-dir", help="the data set's folder, if it has moved since training")
    parser.add_argument("--overwrite", action="store_true", help="write again what exists")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        model, info, name = _model(args)
        config = _config(model, info, args.size)
        sources = image_sources(args.image, config) if args.image else _samples(args, info)
        weights = f"weights: {args.checkpoint.name}" if args.checkpoint else "random weights: no --checkpoint was given"
        done = visualize(
            model.to(args.device).eval(), sources, args.out, name=name,
            origin=f"{weights} · input {config['input_size'][1]} x {config['input_size'][2]}",
            class_names=_class_names(args, info, model), methods=args.methods, layers=args.layer,
            cam_layer=args.cam_layer, target=args.target, overwrite=args.overwrite,
        )  # fmt: skip
    except (TrainError, ValueError, OSError, MissingExtraError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    kept = f", kept {len(done.kept)} that existed (--overwrite writes them again)" if done.kept else ""
    skipped = f", skipped {len(done.skipped)}" if done.skipped else ""
    print(f"wrote {len(done.written)} pages to {args.out}{kept}{skipped}")
    if done.written:
        print(f"open {args.out / done.written[0]}.html")
    return 0 if done.written or done.kept else 1


def _model(args: argparse.Namespace) -> tuple[nn.Module, WeightsInfo | None, str]:
    info = read_info(args.checkpoint) if args.checkpoint else None
    if info is not None and args.model in (None, info.model):
        model, info = load_model(args.checkpoint)
        return visionattn.fuse(model), info, info.model
    if info is not None:
        raise ValueError(f"{args.checkpoint} is of {info.model}, not of {args.model}: leave the model out")
    if args.model is None:
        raise ValueError("give the model's name, or a --checkpoint of tools/train.py, which knows it")
    kwargs = dict(_keyword(text) for text in args.model_kwargs)
    if args.num_classes is not None:
        kwargs["num_classes"] = args.num_classes
    model = build_model(args.model, **kwargs)
    if args.checkpoint:
        load_weights(model, args.checkpoint)
    return visionattn.fuse(model), None, args.model


def _keyword(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--model-kwargs takes KEY=VALUE, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _config(model: nn.Module, info: WeightsInfo | None, size: list[int] | None) -> dict[str, Any]:
    config: dict[str, Any] = resolve_model_data_config(model)
    if info is not None:
        keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
        config |= {key: getattr(info, key) for key in keys}
    if size is not None:
        if len(size) > 2 or min(size) < 1:
            raise ValueError(f"--size takes a side, or height and width; got {' '.join(map(str, size))}")
        config["input_size"] = (config["input_size"][0], size[0], size[-1])
    return config


def _class_names(args: argparse.Namespace, info: WeightsInfo | None, model: Any) -> list[str] | None:
    if args.class_names:
        return args.class_names.read_text().splitlines()
    if info is not None:
        return info.class_names
    if args.checkpoint and getattr(model, "num_classes", 0) == 1000:
        imagenet = ImageNetInfo("imagenet-1k")
        return [imagenet.index_to_description(i).partition(",")[0] for i in range(1000)]
    return None


def _samples(args: argparse.Namespace, info: WeightsInfo | None) -> list[Source]:
    if info is None:
        raise ValueError(
            "give --image, a file or a folder: only a checkpoint of tools/train.py knows images of its own"
        )
    found = validation_samples(args.checkpoint, count=args.samples, data_dir=args.data_dir)
    names = found.class_names or [str(i) for i in range(info.num_classes)]
    sources = []
    for i, (x, shown, label) in enumerate(zip(found.inputs, found.images, found.labels, strict=True)):
        pixels = (torch.atleast_3d(torch.as_tensor(shown)).permute(2, 0, 1) * 255).round().to(torch.uint8)
        picture = as_picture(pixels)
        sources.append(
            Source(f"{i:02}-{names[label].replace('/', '-')}", lambda x=x, picture=picture: (x[None], picture))
        )
    return sources


if __name__ == "__main__":
    sys.exit(main())
