"""Importing this package registers every family with timm."""

from timm.models import list_models as _timm_list_models
from timm.models import model_entrypoint

from visionattn.models import agent, biformer, gated_vit, infvit, inline, litv2, mala, nat, nat_iso, transnext
from visionattn.models._checkpoint import CheckpointError, load_checkpoint

FAMILIES = (agent, biformer, gated_vit, infvit, inline, litv2, mala, nat, nat_iso, transnext)


def list_models(pattern: str = "") -> list[str]:
    """Return the names that this library registers with timm, in natural order.

    Args:
        pattern: A wildcard as in `timm.list_models`, such as ``"biformer_*"``; all if empty.
    """
    return [n for n in _timm_list_models(pattern) if model_entrypoint(n).__module__.startswith(f"{__name__}.")]


__all__ = ["FAMILIES", "CheckpointError", "list_models", "load_checkpoint"]
