"""An official checkpoint to a folder for timm: python tools/convert.py biformer_s biformer_small_best.pth --out DIR."""

import argparse
import sys
from pathlib import Path

import torch
from timm.utils import ParseKwargs

from visionattn import CheckpointError
from visionattn.analysis import export
from visionattn.analysis.folder import FolderError, remapped
from visionattn.analysis.subject import create


def main() -> int:
    """Run the command line; the exit status is 0, or 1 after an error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="the registered model that the file is of")
    parser.add_argument("checkpoint", type=Path, help="the authors' file as published, or one of tools/train.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for config.json, model.safetensors, README.md")
    parser.add_argument("--use-ema", action="store_true", help="the averaged weights, where the file holds both")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE")
    args = parser.parse_args()
    try:
        subject = create(args.model, checkpoint=args.checkpoint, fused=False, use_ema=args.use_ema, **args.model_kwargs)
        print(remapped(subject.model, args.checkpoint, use_ema=args.use_ema))
        card = {
            "description": f"`{args.model}` with the weights of `{args.checkpoint.name}`.",
            "data_config": subject.data_config,
            "label_names": subject.class_names,
        }
        print(export.export(subject.model, args.out, format="safetensors", size=subject.size, card=card))
    except (CheckpointError, FolderError, OSError, TypeError, ValueError, export.ExportError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(f'timm.create_model("local-dir:{args.out}", pretrained=True) makes it, after `import visionattn`')
    return 0


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    sys.exit(main())
