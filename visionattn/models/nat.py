"""NAT, DiNAT and DiNAT_s: hierarchical transformers of (dilated) neighbourhood attention.

Papers: Hassani et al., CVPR 2023, arXiv:2204.07143; Hassani and Shi, arXiv:2209.15001.
Code: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer @ d334f5b (MIT).
Departures: none in what is computed. Maps smaller than the dilated window are zero-padded, which is what the published
weights were trained and evaluated with (NATTEN up to 0.15.1); NATTEN since 0.17 refuses them. Dilations are fitted to
images of 224 x 224: for others, the authors change them (see ``dilations``).
"""

from collections.abc import Sequence
from functools import partial
from itertools import cycle
from typing import Any, Literal

from timm.layers import DropPath, LayerNorm, LayerScale, Mlp, PatchEmbed, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.layers.attention.neighborhood import NeighborhoodAttention
from visionattn.layers.channels_last import ConvNHWC
from visionattn.layers.patch import PatchMerging
from visionattn.models._backbone import Backbone, Stage
from visionattn.models._create import cfg, create
from visionattn.ops import Impl

Dilations = Sequence[Sequence[int]] | None


class NATBlock(nn.Module):
    """Attention and MLP, each after a norm and in a residual. ``(B, H, W, C)`` to ``(B, H, W, C)``.

    Args:
        dim: Channels.
        attn: Map to map of the same shape.
        mlp_ratio: Hidden width of the MLP over the channels.
        layer_scale: Initial factor on each residual, learned by channel; 0 leaves the factors out.
        drop_path: Rate of stochastic depth.
    """

    def __init__(
        self, dim: int, attn: nn.Module, *, mlp_ratio: float, layer_scale: float = 0.0, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=1e-5)
        self.attn = attn
        self.ls1 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.norm2 = LayerNorm(dim, eps=1e-5)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, layer_scale) if layer_scale else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))


class ConvStem(nn.Module):
    """Two overlapping convolutions and a norm: ``(B, in_chans, H, W)`` to ``(B, H / 4, W / 4, dim)``."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1), nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        )
        self.norm = LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsample(nn.Module):
    """An overlapping convolution and a norm: ``(B, H, W, dim)`` to ``(B, H / 2, W / 2, out_dim)``."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.reduction = ConvNHWC(dim, out_dim, 3, stride=2, padding=1, bias=False)
        self.norm = LayerNorm(out_dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))


def patch_stem(in_chans: int, dim: int, patch_size: int) -> PatchEmbed:
    """Return patches and a norm: ``(B, in_chans, H, W)``, zero-padded to whole patches, to ``(B, h, w, dim)``."""
    norm = partial(LayerNorm, eps=1e-5)
    return PatchEmbed(
        None, patch_size, in_chans, dim, norm_layer=norm, flatten=False, output_fmt="NHWC", dynamic_img_pad=True
    )


def init_linear(module: nn.Module) -> None:
    """Initialise linear layers as the authors do."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class NAT(Backbone):
    """NAT, DiNAT and DiNAT_s.

    Args:
        dims: Channels by stage.
        depths: Blocks by stage.
        head_dim: Channels of a head.
        kernel_size: Keys along each axis; odd in the papers.
        dilations: By stage, the dilations of its blocks, repeated for further blocks; all 1 if None. The authors
            take the largest that fits, ``map // kernel_size`` at the training size, in every second block.
        mlp_ratio: Hidden width of the MLPs over the channels.
        layer_scale: Initial factor on each residual, learned by channel; 0 leaves the factors out.
        style: ``"nat"``: overlapping convolutions make the stem and go between stages. ``"swin"``: patches of 4 x 4,
            and patch merging (DiNAT_s).
        drop_path_rate: Rate of the last block; rises linearly from 0.
        impl: Implementation of the attention operator.
        **head: ``in_chans``, ``num_classes``, ``global_pool``, ``drop_rate``.
    """

    no_decay = ("rpb",)
    official_rules = (
        (r"^patch_embed\.", "stem."),
        (r"^(?:levels|layers)\.0\.downsample\.", "stages.1.downsample."),
        (r"^(?:levels|layers)\.1\.downsample\.", "stages.2.downsample."),
        (r"^(?:levels|layers)\.2\.downsample\.", "stages.3.downsample."),
        (r"^(?:levels|layers)\.", "stages."),
        (r"\.gamma([12])$", r".ls\1.gamma"),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    )

    def __init__(
        self,
        *,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (3, 4, 6, 5),
        head_dim: int = 32,
        kernel_size: int = 7,
        dilations: Dilations = None,
        mlp_ratio: float = 3.0,
        layer_scale: float = 0.0,
        style: Literal["nat", "swin"] = "nat",
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        impl: Impl = "auto",
        **head: Any,
    ) -> None:
        super().__init__(dims=dims, reductions=[4 * 2**i for i in range(len(dims))], in_chans=in_chans, **head)
        if dilations is None:
            dilations = [(1,)] * len(dims)
        if not len(dims) == len(depths) == len(dilations):
            raise ValueError(f"dims, depths and dilations must be as long, got {dims}, {depths} and {dilations}")
        if not all(dilations):
            raise ValueError(f"each stage needs at least one dilation, got {dilations}")
        if style not in ("nat", "swin"):
            raise ValueError(f"style must be 'nat' or 'swin', got {style!r}")
        rates: list[Any] = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stem = patch_stem(in_chans, dims[0], 4) if style == "swin" else ConvStem(in_chans, dims[0])
        downsample = PatchMerging if style == "swin" else ConvDownsample
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks = []
            for rate, dilation in zip(rates[i], cycle(dilations[i])):
                attn = NeighborhoodAttention(
                    dim, num_heads=dim // head_dim, kernel_size=kernel_size, dilation=dilation, impl=impl
                )
                blocks.append(NATBlock(dim, attn, mlp_ratio=mlp_ratio, layer_scale=layer_scale, drop_path=rate))
            self.stages.append(Stage(downsample(dims[i - 1], dim) if i else nn.Identity(), blocks))
        self.norm = LayerNorm(dims[-1], eps=1e-5)
        self.apply(init_linear)


AT_224 = ((1, 8), (1, 4), (1, 2), (1,))
MINI: dict[str, Any] = {}
TINY: dict[str, Any] = {"depths": (3, 4, 18, 5)}
SMALL: dict[str, Any] = {"dims": (96, 192, 384, 768), "depths": (3, 4, 18, 5), "mlp_ratio": 2.0}
BASE: dict[str, Any] = {**SMALL, "dims": (128, 256, 512, 1024), "layer_scale": 1e-5}
LARGE: dict[str, Any] = {**SMALL, "dims": (192, 384, 768, 1536)}
SWIN: dict[str, Any] = {"depths": (2, 2, 18, 2), "mlp_ratio": 4.0, "style": "swin", "dilations": AT_224}

ARCHS: dict[str, dict[str, Any]] = {
    "nat_mini": MINI,
    "nat_t": TINY,
    "nat_s": {**SMALL, "layer_scale": 1e-5},
    "nat_b": BASE,
    "dinat_mini": {**MINI, "dilations": AT_224},
    "dinat_t": {**TINY, "dilations": AT_224},
    "dinat_s": {**SMALL, "dilations": AT_224},  # no layer scale, although nat_s has one
    "dinat_b": {**BASE, "dilations": AT_224},
    "dinat_l": {**LARGE, "dilations": AT_224},
    "dinats_t": {**SWIN, "dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2)},
    "dinats_s": {**SWIN, "dims": (96, 192, 384, 768)},
    "dinats_b": {**SWIN, "dims": (128, 256, 512, 1024)},
    "dinats_l": {**SWIN, "dims": (192, 384, 768, 1536)},
}


def _cfg(name: str, **kwargs: Any) -> dict[str, Any]:
    return cfg(
        first_conv="stem.proj" if name.startswith("dinats") else "stem.proj.0",
        license="mit",
        paper_ids="arXiv:2204.07143" if name.startswith("nat") else "arXiv:2209.15001",
        origin_url="https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {f"{name}.{'in22k_ft_in1k' if name.endswith('_l') else 'in1k'}": _cfg(name) for name in ARCHS}
)


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    return create(NAT, ARCHS, "nat_mini", pretrained, **kwargs)


@register_model
def nat_t(pretrained: bool = False, **kwargs: Any) -> NAT:
    return create(NAT, ARCHS, "nat_t", pretrained, **kwargs)


@register_model
def nat_s(pretrained: bool = False, **kwargs: Any) -> NAT:
    return create(NAT, ARCHS, "nat_s", pretrained, **kwargs)


@register_model
def nat_b(pretrained: bool = False, **kwargs: Any) -> NAT:
    return create(NAT, ARCHS, "nat_b", pretrained, **kwargs)


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    return create(NAT, ARCHS, "dinat_mini", pretrained, **kwargs)


@register_model
def dinat_t(pretrained: bool = False, **kwargs: Any) -> NAT:
    return create(NAT, ARCHS, "dinat_t", pretrained, **kwargs)


@register_model
def dinat_s(pretrained: bool = False, **kwargs: Any) -> NAT:
    return create(NAT, ARCHS, "dinat_s", pretrained, **kwargs)


@register_model
def dinat_b(pretrained: bool = False, **kwargs: Any) -> NAT:
    return create(NAT, ARCHS, "dinat_b", pretrained, **kwargs)


@register_model
def dinat_l(pretrained: bool = False, **kwargs: Any) -> NAT:
    return create(NAT, ARCHS, "dinat_l", pretrained, **kwargs)


@register_model
def dinats_t(pretrained: bool = False, **kwargs: Any) -> NAT:
    return create(NAT, ARCHS, "dinats_t", pretrained, **kwargs)


@register_model
def dinats_s(pretrained: bool = False, **kwargs: Any) -> NAT:
    return create(NAT, ARCHS, "dinats_s", pretrained, **kwargs)


@register_model
def dinats_b(pretrained: bool = False, **kwargs: Any) -> NAT:
    return create(NAT, ARCHS, "dinats_b", pretrained, **kwargs)


@register_model
def dinats_l(pretrained: bool = False, **kwargs: Any) -> NAT:
    return create(NAT, ARCHS, "dinats_l", pretrained, **kwargs)
