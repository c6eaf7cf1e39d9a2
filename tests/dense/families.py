"""One small variant a family, those of timm among them, as arguments of `Backbone`."""

from typing import Any

from tests.models.variants import TINY
from visionattn.dense import Backbone

TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "convit": ("convit_tiny", {"embed_dim": 16, "num_heads": 2, "depth": 3, "local_up_to_layer": 2, "img_size": 64}),
    "davit": ("davit_tiny", {"embed_dims": (16, 32), "depths": (1, 1), "num_heads": (1, 2)}),
    "maxvit": ("test_maxvit", {}),
    "shvit": ("shvit_s1", {"embed_dim": (16, 24, 32), "partial_dim": (8, 12, 16), "depth": (1, 1, 1)}),
}
FAMILIES = {**TINY, **TIMM}
PLAIN = [
    *("nat_iso", "agent_deit", "inline_deit", "infvit_linear", "infvit_pure", "convit"),
    *("gated_vit", "gated_vit_elementwise", "clipped_vit"),
]


def arguments(family: str, **kwargs: Any) -> dict[str, Any]:
    """Arguments of the small variant's `Backbone`."""
    name, arch = FAMILIES[family]
    return {"name": name, "pyramid_channels": 16, **arch, **kwargs}


def backbone(family: str, **kwargs: Any) -> Backbone:
    """The small variant's `Backbone`."""
    return Backbone(**arguments(family, **kwargs))
