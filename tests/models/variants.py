"""One small variant a family, for the checks that are too dear for every registered name."""

from typing import Any

import timm
from torch import nn

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "biformer": ("biformer_t", {"dims": (16, 32, 48, 64), "depths": (1, 1, 2, 1), "head_dim": 16}),
    "biformer_stl_nchw": ("biformer_stl_nchw", {"dims": (16, 32, 48, 64), "depths": (1, 1, 2, 1), "head_dim": 16}),
    "nat": ("nat_mini", {"dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1), "head_dim": 16, "layer_scale": 0.5}),
    "dinat": (
        "dinat_mini",
        {"dims": (16, 32), "depths": (2, 1), "head_dim": 8, "kernel_size": 3, "dilations": ((1, 2), (3,))},
    ),
    "dinats": ("dinats_t", {"dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1), "head_dim": 16, "kernel_size": 3}),
    "nat_iso": ("nat_iso_s", {"dim": 32, "depth": 4, "patch_size": 8, "head_dim": 16, "kernel_size": 3}),
}


def tiny(family: str, **kwargs: Any) -> nn.Module:
    """Create the small variant of a family, in eval mode unless it is trained."""
    name, arch = TINY[family]
    return timm.create_model(name, **{"num_classes": 7, **arch, **kwargs}).eval()
