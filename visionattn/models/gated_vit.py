"""ViT-S/16 with output gates or clipped softmax: attention that can do nothing, for models that quantise well.

Papers: Bondarenko et al., NeurIPS 2023, arXiv:2306.12929 (gates and clipping); Qiu et al., arXiv:2505.06708 (the kinds
``"headwise"`` and ``"elementwise"``). Code: https://github.com/Qualcomm-AI-research/outlier-free-transformers @ 1e59744
(BSD-3-Clause-Clear), whose attention module this is, and which holds language models alone. The rest is timm's
ViT-S/16; official keys are that module's inside timm's.
Departures: any input size runs, with the position embedding resized.
"""

import logging
import re
from typing import Any, Literal

import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from visionattn.layers.attention.gated import Gate, GatedAttention
from visionattn.models._backbone import update_model_args
from visionattn.models._checkpoint import StateDict, fuse_qkv
from visionattn.models._create import cfg, create
from visionattn.models._hosts.deit import PlainViT
from visionattn.ops import Impl

_logger = logging.getLogger(__name__)


class GatedViT(PlainViT):
    """Plain vision transformer with output gates, clipped softmax, both, or neither.

    Args:
        gate: Kind of gate, see `visionattn.layers.attention.gated.GatedAttention`; None or ``"none"`` for no gate.
            ``"auto"`` is ``"linear"``, but follows a weight file without gates when one is loaded, with a warning:
            `timm.create_model` hands no argument on that is None, so ``gate=None`` arrives here as ``"auto"``.
        gate_init: Value of the gates at the start.
        fine_tuning: Divide the gates by ``gate_init``, to start from a model without gates.
        clip: ``(gamma, zeta)`` of the clipped softmax; plain softmax if None.
        alpha: Clip with ``gamma = -alpha / max_seq_length`` and ``zeta = 1``, in place of ``clip``.
        max_seq_length: A constant, whatever the input's size; the tokens at ``img_size`` if None.
        dim: Channels.
        num_heads: Heads.
        impl: Implementation of the attention operator.
        **kwargs: Arguments of `PlainViT`.
    """

    official_rules = (
        (r"^patch_embed\.", "stem."),
        (r"^blocks\.", "stages."),
        (r"\.attn\.out_proj\.", ".attn.proj."),
        (r"\.attn\.alpha$", ".attn.gate.logit"),
        (r"\.attn\.alpha\.(weight|bias)$", r".attn.gate.fc.\1"),
        (r"\.attn\.alpha\.(\d+)\.0\.", r".attn.gate.fc1.\1."),
        (r"\.attn\.alpha\.(\d+)\.(?:2\.)?", r".attn.gate.fc2.\1."),
    )

    def __init__(
        self,
        *,
        gate: Gate | Literal["auto", "none"] | None = "auto",
        gate_init: float = 0.25,
        fine_tuning: bool = False,
        clip: tuple[float, float] | None = None,
        alpha: float | None = None,
        max_seq_length: int | None = None,
        dim: int = 384,
        num_heads: int = 6,
        impl: Impl = "auto",
        **kwargs: Any,
    ) -> None:
        if clip is not None and alpha is not None:
            raise ValueError(f"give clip or alpha, not both; got clip={tuple(clip)} and alpha={alpha}")
        length = max_seq_length or _tokens(**kwargs)
        if alpha is not None:
            clip = (-alpha / length, 1.0)
        kind: Any = {"auto": "linear", "none": None}.get(gate or "none", gate)

        def mixer(i: int) -> nn.Module:
            return GatedAttention(
                dim, num_heads=num_heads, gate=kind, gate_init=gate_init, fine_tuning=fine_tuning, clip=clip, impl=impl
            )

        super().__init__(mixer=mixer, dim=dim, **kwargs)
        self.gate_follows_weights = gate == "auto"
        self.max_seq_length = length

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """As `PlainViT.set_input_size`; the constant by which ``alpha`` is divided stays."""
        super().set_input_size(img_size)
        update_model_args(self, max_seq_length=self.max_seq_length)

    def from_official(self, state: StateDict) -> StateDict:
        """Rename the authors' keys, join their projections, and stack what they keep a head at a time."""
        state = fuse_qkv(super().from_official(state))
        for first in [k for k in state if re.search(r"\.gate\.fc[12]\.0\.", k)]:
            before, _, after = first.rpartition(".0.")
            heads = [k for k in state if k.startswith(f"{before}.") and k.endswith(f".{after}")]
            state[f"{before}.{after}"] = torch.stack([state.pop(f"{before}.{i}.{after}") for i in range(len(heads))])
        return state

    def settle(self, state: StateDict) -> None:
        """Take the gates out if nobody asked for them and the weights that are loaded have none."""
        ungated = {k for k in self.state_dict() if ".attn.gate." not in k}
        if self.gate_follows_weights and ungated <= set(state) and not any(".attn.gate." in k for k in state):
            _logger.warning("The weights have no gates, so the model loses its own; gate='none' says so at once.")
            for block in self.stages:
                block.attn.gate = None
            update_model_args(self, gate="none")


def _tokens(img_size: int | tuple[int, int] = 224, patch_size: int = 16, **_: Any) -> int:
    H, W = (img_size, img_size) if isinstance(img_size, int) else img_size
    return 1 + -(-H // patch_size) * -(-W // patch_size)


ARCHS: dict[str, dict[str, Any]] = {"gated_vit_s16": {}, "clipped_vit_s16": {"gate": "none"}}

default_cfgs = generate_default_cfgs(
    {
        f"{name}.in1k": cfg(
            first_conv="stem.proj",
            classifier="head",
            pool_size=None,
            license="bsd-3-clause-clear",
            paper_ids="arXiv:2306.12929",
            origin_url="https://github.com/Qualcomm-AI-research/outlier-free-transformers",
        )
        for name in ARCHS
    }
)


@register_model
def gated_vit_s16(pretrained: bool = False, **kwargs: Any) -> GatedViT:
    """ViT-S/16 with gates (``gate=``), and with clipped softmax where ``clip`` or ``alpha`` is given."""
    return create(GatedViT, ARCHS, "gated_vit_s16", pretrained, **kwargs)


@register_model
def clipped_vit_s16(pretrained: bool = False, **kwargs: Any) -> GatedViT:
    """ViT-S/16 with clipped softmax: ``clip=(gamma, zeta)``, or ``alpha``, which is 2 if neither is given.

    To train from random weights, give an ``alpha`` below 1: attention is even at the start, and from 1 on all of it is
    clipped to zero, where no gradient comes from.
    """
    if kwargs.get("clip") is None and kwargs.get("alpha") is None:
        kwargs["alpha"] = 2.0
    return create(GatedViT, ARCHS, "clipped_vit_s16", pretrained, **kwargs)
