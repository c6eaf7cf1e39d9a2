"""InfViT: plain vision transformers with infinite self-attention, pure (matrix-normalised) or linear (pooled).

Paper: Roffo et al., arXiv:2603.00175. Code: https://github.com/giorgioroffo/infinite-self-attention @ 4a37fc0 (MIT),
which holds the attention alone. ``infvit_s6_*`` is the model of its example; ``infvit_b16_*`` the torchvision ViT that
another example converts; ``infvit_4l_*`` and ``infvit_24l_*`` are reconstructions of the paper's models at the width of
ViT-L, with 52.4 and 304.3 M parameters where the paper gives 53.5 and 57.7 (4 layers) and 330.6 (24 layers).
Departures: the discount rho is learned (there, the forward pass cuts its gradient); any input size runs, with the
position embedding resized; no dropout inside the blocks.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from visionattn.layers.attention.infinite import InfiniteAttention
from visionattn.models._checkpoint import StateDict, fuse_qkv
from visionattn.models._create import cfg, create
from visionattn.models._hosts.deit import PlainViT
from visionattn.ops import Impl
from visionattn.ops.infinite_attention import Form


class InfViT(PlainViT):
    """Plain vision transformer with infinite self-attention.

    Args:
        form: ``"pure"`` or ``"linear"``; see `visionattn.ops.infinite_attention`.
        dim: Channels.
        depth: Blocks.
        num_heads: Heads.
        rho_init: Discount of every block at the start, in (0, 1).
        impl: Implementation of the attention operator.
        **kwargs: Arguments of `PlainViT`, ``representation_size`` among them.
    """

    official_rules = (
        (r"^class_token$", "cls_token"),  # torchvision's names
        (r"^conv_proj\.", "stem.proj."),
        (r"^encoder\.pos_embedding$", "pos_embed"),
        (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"stages.\1."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.self_attention\.", ".attn."),
        (r"^encoder\.ln\.", "norm."),
        (r"^heads\.head\.", "head."),
        (r"^heads\.pre_logits\.", "pre_logits."),
        (r"^patch_embed\.(?=weight|bias)", "stem.proj."),  # the example's names
        (r"^encoder\.layers\.(\d+)\.", r"stages.\1."),
        (r"^encoder\.norm\.", "norm."),
        (r"\.(?:mlp|ff)\.0\.", ".mlp.fc1."),
        (r"\.(?:mlp|ff)\.3\.", ".mlp.fc2."),
        (r"\.attn\.out_proj\.", ".attn.proj."),
    )

    def __init__(
        self,
        *,
        form: Form = "linear",
        dim: int = 1024,
        depth: int = 4,
        num_heads: int = 16,
        rho_init: float = 0.9,
        impl: Impl = "auto",
        **kwargs: Any,
    ) -> None:
        def mixer(i: int) -> nn.Module:
            return InfiniteAttention(dim, num_heads=num_heads, form=form, rho_init=rho_init, impl=impl)

        super().__init__(mixer=mixer, dim=dim, depth=depth, **kwargs)

    def from_official(self, state: StateDict) -> StateDict:
        """Rename the authors' keys and join their projections of queries, keys and values."""
        return fuse_qkv(super().from_official(state))


_SIZES: dict[str, dict[str, Any]] = {
    "4l": {},
    "24l": {"depth": 24},
    "b16": {"dim": 768, "depth": 12, "num_heads": 12},
    "s6": {"dim": 384, "depth": 6, "num_heads": 6, "eps": 1e-5, "rho_init": 0.95},
}
ARCHS: dict[str, dict[str, Any]] = {
    f"infvit_{size}_{form}": {"form": form, **arch} for size, arch in _SIZES.items() for form in ("linear", "pure")
}

default_cfgs = generate_default_cfgs(
    {
        f"{name}.in1k": cfg(
            first_conv="stem.proj",
            classifier="head",
            pool_size=None,
            license="mit",
            paper_ids="arXiv:2603.00175",
            origin_url="https://github.com/giorgioroffo/infinite-self-attention",
        )
        for name in ARCHS
    }
)


@register_model
def infvit_4l_linear(pretrained: bool = False, **kwargs: Any) -> InfViT:
    return create(InfViT, ARCHS, "infvit_4l_linear", pretrained, **kwargs)


@register_model
def infvit_4l_pure(pretrained: bool = False, **kwargs: Any) -> InfViT:
    return create(InfViT, ARCHS, "infvit_4l_pure", pretrained, **kwargs)


@register_model
def infvit_24l_linear(pretrained: bool = False, **kwargs: Any) -> InfViT:
    return create(InfViT, ARCHS, "infvit_24l_linear", pretrained, **kwargs)


@register_model
def infvit_24l_pure(pretrained: bool = False, **kwargs: Any) -> InfViT:
    return create(InfViT, ARCHS, "infvit_24l_pure", pretrained, **kwargs)


@register_model
def infvit_b16_linear(pretrained: bool = False, **kwargs: Any) -> InfViT:
    return create(InfViT, ARCHS, "infvit_b16_linear", pretrained, **kwargs)


@register_model
def infvit_b16_pure(pretrained: bool = False, **kwargs: Any) -> InfViT:
    return create(InfViT, ARCHS, "infvit_b16_pure", pretrained, **kwargs)


@register_model
def infvit_s6_linear(pretrained: bool = False, **kwargs: Any) -> InfViT:
    return create(InfViT, ARCHS, "infvit_s6_linear", pretrained, **kwargs)


@register_model
def infvit_s6_pure(pretrained: bool = False, **kwargs: Any) -> InfViT:
    return create(InfViT, ARCHS, "infvit_s6_pure", pretrained, **kwargs)
