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
    "transnext": ("transnext_micro", {"dims": (16, 32, 48, 64), "depths": (1, 1, 2, 1), "head_dim": 16}),
    "transnext_interpolate": (
        "transnext_micro_aaaa",
        {"dims": (16, 32), "depths": (1, 1), "mlp_ratios": (4, 2), "sr_ratios": (4, 2), "head_dim": 8, "img_size": 64}
        | {"bias_mode": "interpolate", "fixed_pool_size": 3},
    ),
    "agent_deit": (
        "agent_deit_t",
        {"dim": 32, "num_heads": 2, "depth": 3, "agents": (3, 3), "agent_layers": 2, "img_size": 64},
    ),
    "agent_pvt": (
        "agent_pvt_t",
        {"dims": (16, 32), "depths": (1, 1), "mlp_ratios": (2, 2), "num_heads": (1, 2), "img_size": 64}
        | {"agents": ((2, 2), (3, 3)), "pools": ((3, 3), (3, 3))},
    ),
    "agent_swin": (
        "agent_swin_t",
        {
            "dims": (16, 32),
            "depths": (1, 2),
            "num_heads": (2, 2),
            "agent_depths": (1, 0),
            "window_size": 4,
            "img_size": 64,
        },
    ),
    "agent_cswin": (
        "agent_cswin_t",
        {"dims": (16, 32, 48), "depths": (1, 1, 1), "num_heads": (2, 2, 2), "agent_depths": (1, 0, 0), "split_size": 3}
        | {"img_size": 64},
    ),
    "infvit_linear": ("infvit_s6_linear", {"dim": 32, "num_heads": 2, "depth": 3, "img_size": 64}),
    "infvit_pure": (
        "infvit_s6_pure",
        {"dim": 32, "num_heads": 2, "depth": 3, "img_size": 64, "representation_size": 48},
    ),
    "gated_vit": ("gated_vit_s16", {"dim": 32, "num_heads": 2, "depth": 3, "gate": "mlp", "img_size": 64}),
    "gated_vit_elementwise": (
        "gated_vit_s16",
        {"dim": 32, "num_heads": 2, "depth": 3, "gate": "elementwise", "img_size": 64},
    ),
    "clipped_vit": (
        "clipped_vit_s16",
        {"dim": 32, "num_heads": 2, "depth": 3, "gate": "per_head", "clip": (-0.02, 1.01), "img_size": 64},
    ),
    "inline_deit": ("inline_deit_t", {"dim": 32, "num_heads": 2, "depth": 2, "img_size": 64, "global_pool": "avg"}),
    "inline_pvt": (
        "inline_pvt_t",
        {"dims": (16, 32), "depths": (1, 1), "mlp_ratios": (2, 2), "num_heads": (1, 2), "img_size": 64},
    ),
    "inline_swin": (
        "inline_swin_t",
        {"dims": (16, 32), "depths": (1, 2), "num_heads": (2, 2), "inline_depths": (1, 0), "window_size": 4},
    ),
    "inline_cswin": (
        "inline_cswin_t",
        {"dims": (16, 32), "depths": (1, 1), "num_heads": (2, 2), "inline_depths": (1, 0), "split_size": 3},
    ),
    "mala": ("mala_t", {"dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2), "projection": 96}),
    "litv2": ("litv2_s", {"dims": (16, 32, 48, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 4), "alpha": 0.5}),
}


def tiny(family: str, **kwargs: Any) -> nn.Module:
    """Create the small variant of a family, in eval mode unless it is trained."""
    name, arch = TINY[family]
    return timm.create_model(name, **{"num_classes": 7, **arch, **kwargs}).eval()
