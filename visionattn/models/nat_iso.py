"""Isotropic NAT and DiNAT: a plain vision transformer whose attention is (dilated) neighbourhood attention.

Papers: Hassani et al., CVPR 2023, arXiv:2204.07143; Hassani and Shi, arXiv:2209.15001.
Code: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer @ d334f5b (MIT).
Departures: any image size runs, zero-padded to whole patches; the authors' code takes 224 x 224 alone. Their
``vitrpb``, global attention with relative position bias, is neighbourhood attention with a kernel as large as the map:
at 224 x 224, ``nat_iso_s`` and ``nat_iso_b`` with ``kernel_size=14`` compute it from its official weights.
"""

from collections.abc import Sequence
from itertools import cycle
from typing import Any

from timm.layers import LayerNorm, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import nn

from visionattn.layers.attention.neighborhood import NeighborhoodAttention
from visionattn.models._backbone import Backbone
from visionattn.models._create import cfg, create
from visionattn.models.nat import NATBlock, init_linear, patch_stem
from visionattn.ops import Impl


class IsotropicNAT(Backbone):
    """Patches, equal blocks, the mean of the normed tokens; no position embedding, no class token.

    Args:
        dim: Channels.
        depth: Blocks.
        patch_size: Side of a patch.
        head_dim: Channels of a head.
        kernel_size: Keys along each axis.
        dilations: Dilations of the blocks, repeated for further blocks; all 1 if None.
        mlp_ratio: Hidden width of the MLPs over the channels.
        layer_scale: Initial factor on each residual, learned by channel; 0 leaves the factors out.
        drop_path_rate: Rate of the last block; rises linearly from 0.
        impl: Implementation of the attention operator.
        **head: ``in_chans``, ``num_classes``, ``global_pool``, ``drop_rate``.
    """

    isotropic = True
    no_decay = ("rpb",)
    official_rules = (
        (r"\.relative_position_index$", None),
        (r"^patch_embed\.", "stem."),
        (r"^layers\.", "stages."),
        (r"\.gamma([12])$", r".ls\1.gamma"),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    )

    def __init__(
        self,
        *,
        dim: int = 384,
        depth: int = 12,
        patch_size: int = 16,
        head_dim: int = 32,
        kernel_size: int = 7,
        dilations: Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        layer_scale: float = 0.0,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        impl: Impl = "auto",
        **head: Any,
    ) -> None:
        super().__init__(dims=[dim] * depth, reductions=[patch_size] * depth, in_chans=in_chans, **head)
        dilations = (1,) if dilations is None else dilations
        if not dilations:
            raise ValueError("dilations must not be empty")
        self.stem = patch_stem(in_chans, dim, patch_size)
        rates: list[Any] = calculate_drop_path_rates(drop_path_rate, depth)
        blocks = []
        for rate, dilation in zip(rates, cycle(dilations)):
            attn = NeighborhoodAttention(
                dim, num_heads=dim // head_dim, kernel_size=kernel_size, dilation=dilation, impl=impl
            )
            blocks.append(NATBlock(dim, attn, mlp_ratio=mlp_ratio, layer_scale=layer_scale, drop_path=rate))
        self.stages = nn.ModuleList(blocks)
        self.norm = LayerNorm(dim, eps=1e-5)
        self.apply(init_linear)


ARCHS: dict[str, dict[str, Any]] = {
    "nat_iso_s": {},
    "nat_iso_b": {"dim": 768},
    "dinat_iso_s": {"dilations": (1, 2)},
    "dinat_iso_b": {"dim": 768, "dilations": (1, 2)},
}

default_cfgs = generate_default_cfgs(
    {
        f"{name}.in1k": cfg(
            pool_size=(14, 14),
            first_conv="stem.proj",
            license="mit",
            paper_ids="arXiv:2209.15001",
            origin_url="https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        )
        for name in ARCHS
    }
)


@register_model
def nat_iso_s(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    return create(IsotropicNAT, ARCHS, "nat_iso_s", pretrained, **kwargs)


@register_model
def nat_iso_b(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    return create(IsotropicNAT, ARCHS, "nat_iso_b", pretrained, **kwargs)


@register_model
def dinat_iso_s(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    return create(IsotropicNAT, ARCHS, "dinat_iso_s", pretrained, **kwargs)


@register_model
def dinat_iso_b(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    return create(IsotropicNAT, ARCHS, "dinat_iso_b", pretrained, **kwargs)
