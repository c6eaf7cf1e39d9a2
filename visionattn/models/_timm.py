"""The authors' weight files of the families whose models are timm's own: DaViT, SHViT (ConViT's keys are timm's)."""

import re

from timm.models.davit import DaVit
from timm.models.davit import checkpoint_filter_fn as davit_keys
from timm.models.shvit import SHViT
from torch import Tensor, nn


def from_official(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict in the authors' naming under timm's names; any other passes unchanged."""
    if isinstance(model, DaVit):
        return dict(davit_keys(state, model))
    if isinstance(model, SHViT):
        return {_shvit_key(key): value for key, value in state.items()}
    return state


def _shvit_key(key: str) -> str:
    """The authors' ``blocks2`` and ``blocks3`` begin with the three modules of timm's ``downsample``."""
    match = re.match(r"blocks([123])\.(\d+)\.(.*)", key)
    if match is None:
        return key
    stage, number, rest = int(match[1]) - 1, int(match[2]), match[3]
    if stage == 0:
        return f"stages.0.blocks.{number}.{rest}"
    if number >= 3:
        return f"stages.{stage}.blocks.{number - 3}.{rest}"
    if number == 1:
        return f"stages.{stage}.downsample.2.{rest}"
    inner, _, rest = rest.partition(".")
    return f"stages.{stage}.downsample.{int(inner) + (3 if number == 2 else 0)}.{rest}"
