"""``python -m visionattn.env``: versions, devices, and which implementation of each operator can run here."""

import importlib
import importlib.metadata
import platform

import torch

from visionattn import __version__
from visionattn.ops import IMPLS, OPERATORS
from visionattn.ops._dispatch import missing

PACKAGES = {  # by the name of the distribution
    **{name: name for name in ("torch", "timm", "torchvision", "triton", "natten", "accelerate", "onnxruntime")},
    **{name: f"onedl-{name}" for name in ("mmengine", "mmcv", "mmdetection", "mmsegmentation")},
}


def report() -> str:
    """Return the whole report as text."""
    lines = [f"visionattn {__version__}, Python {platform.python_version()}, {platform.platform()}", "", "packages"]
    lines += [f"  {name:16} {_version(distribution)}" for name, distribution in PACKAGES.items()]
    lines += ["", "devices", f"  cpu              {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        memory = gpu.total_memory / 2**30
        lines.append(f"  cuda:{i}           {gpu.name}, sm_{gpu.major}{gpu.minor}, {memory:.0f} GiB")
    if not torch.cuda.is_available():
        lines.append("  cuda             none")
    lines += ["", 'operators (impl="auto" takes the first that accepts the input)']
    for name in OPERATORS:
        known = importlib.import_module(f"visionattn.ops.{name}").IMPLS
        lines.append(f"  {name}")
        lines += [f"    {impl:10} {missing(impl) or 'runs here'}" for impl in known]
        absent = [impl for impl in IMPLS if impl not in known]
        lines.append(f"    not written for this operator: {', '.join(absent)}")
    return "\n".join(lines)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    print(report())
