"""Attention backbones for computer vision. Importing this package registers its models with timm."""

from visionattn.convert import ConvertReport, convert, convert_report
from visionattn.fuse import FuseReport, fuse, fuse_report
from visionattn.models import CheckpointError, list_models, load_checkpoint
from visionattn.ops import UnsupportedError, get_impl, set_autotune, set_impl, use_impl

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConvertReport",
    "FuseReport",
    "UnsupportedError",
    "convert",
    "convert_report",
    "fuse",
    "fuse_report",
    "get_impl",
    "list_models",
    "load_checkpoint",
    "set_autotune",
    "set_impl",
    "use_impl",
]
