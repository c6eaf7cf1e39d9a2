"""TransNeXt: foveal visual perception by aggregated attention, and convolutional gated linear units.

Paper: Shi, CVPR 2024, arXiv:2311.17132. Code: https://github.com/DaiShiResearch/TransNeXt @ c8a9974 (Apache-2.0).
Departures: any input size runs, as in the authors' dense prediction code; their classification code takes one square
size only. Pooled maps have one token a side at least, and ``fixed_pool_size`` tokens at most the map's own side. Maps
of ``img_size`` are rounded up as the patch embeddings do, the authors round down; sizes that 32 divides agree.
"""

import math
from typing import Any, Literal

from timm.layers import DropPath, LayerNorm, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.layers.attention.aggregated import AggregatedAttention, FullCosineAttention
from visionattn.layers.channels_last import ConvNHWC, ToNHWC
from visionattn.layers.conv_glu import ConvGLU
from visionattn.models._backbone import Backbone, Stage, update_model_input_size
from visionattn.models._create import cfg, create
from visionattn.models._hosts._block import pair
from visionattn.ops import Impl

BiasMode = Literal["extrapolate", "interpolate"]


class TransNeXtBlock(nn.Module):
    """Attention and gated MLP, each after a norm and in a residual. ``(B, H, W, C)`` to ``(B, H, W, C)``."""

    def __init__(self, dim: int, attn: nn.Module, *, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = LayerNorm(dim, eps=1e-6)
        self.mlp = ConvGLU(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TransNeXt(Backbone):
    """TransNeXt, four stages, each ended by a norm.

    Args:
        dims: Channels by stage.
        depths: Blocks by stage.
        mlp_ratios: Hidden width of the gated MLPs over the channels, by stage.
        sr_ratios: By stage, how much smaller the pooled map's sides are; 1 is full attention.
        head_dim: Channels of a head.
        window: Side of the window of aggregated attention.
        img_size: Size of the images (side, or height and width) that position biases are made for if ``bias_mode`` is
            ``"interpolate"``; nothing depends on it otherwise.
        pretrain_size: Side of the images that the weights were trained at: unit of the position coordinates. It stays
            when the weights go on to larger images.
        fixed_pool_size: Side of the pooled maps, whatever the input's ("linear inference mode"; the paper uses 7).
        bias_mode: Position biases for another size: ``"extrapolate"`` makes them for the size that comes,
            ``"interpolate"`` resizes those for ``img_size`` bilinearly (as the authors do for detection).
        drop_path_rate: Rate of the last block; rises linearly from 0.
        impl: Implementation of the attention operator.
        **head: ``in_chans``, ``num_classes``, ``global_pool``, ``drop_rate``.
    """

    no_decay = ("query_embedding", "relative_pos_bias_local", "cpb", "temperature")
    official_rules = (
        (r"relative_pos_index|relative_coords_table|seq_length_scale|padding_mask", None),
        (r"^patch_embed1\.proj\.", "stem.0."),
        (r"^patch_embed1\.norm\.", "stem.2."),
        *((rf"^patch_embed{i + 1}\.proj\.", f"stages.{i}.downsample.0.") for i in range(1, 4)),
        *((rf"^patch_embed{i + 1}\.norm\.", f"stages.{i}.downsample.1.") for i in range(1, 4)),
        *((rf"^block{i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
        *((rf"^norm{i + 1}\.", f"stages.{i}.norm.") for i in range(4)),
        (r"\.attn\.cpb_fc(\d)\.", r".attn.cpb.fc\1."),
        (r"\.mlp\.dwconv\.dwconv\.", ".mlp.dwconv."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    )

    def __init__(
        self,
        *,
        dims: tuple[int, ...] = (48, 96, 192, 384),
        depths: tuple[int, ...] = (2, 2, 15, 2),
        mlp_ratios: tuple[float, ...] = (8, 8, 4, 4),
        sr_ratios: tuple[int, ...] = (8, 4, 2, 1),
        head_dim: int = 24,
        window: int = 3,
        img_size: int | tuple[int, int] = 224,
        pretrain_size: int = 224,
        fixed_pool_size: int | None = None,
        bias_mode: BiasMode = "extrapolate",
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        impl: Impl = "auto",
        **head: Any,
    ) -> None:
        super().__init__(dims=dims, reductions=[4 * 2**i for i in range(len(dims))], in_chans=in_chans, **head)
        if not len(dims) == len(depths) == len(mlp_ratios) == len(sr_ratios):
            raise ValueError(
                f"dims, depths, mlp_ratios and sr_ratios must be as long, got {dims}, {depths}, {mlp_ratios} and "
                f"{sr_ratios}"
            )
        if bias_mode not in ("extrapolate", "interpolate"):
            raise ValueError(f"bias_mode must be 'extrapolate' or 'interpolate', got {bias_mode!r}")
        if pretrain_size < 4 * 2 ** len(dims):
            raise ValueError(f"pretrain_size must be {4 * 2 ** len(dims)} at least, got {pretrain_size}")
        self.bias_mode = bias_mode
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, dims[0], 7, stride=4, padding=3), ToNHWC(), LayerNorm(dims[0], eps=1e-5)
        )
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks = []
            for rate in rates[i]:
                pretrain_side = pretrain_size // (4 * 2**i)
                attn: nn.Module
                if sr_ratios[i] == 1:
                    attn = FullCosineAttention(dim, num_heads=dim // head_dim, pretrain_side=pretrain_side)
                else:
                    attn = AggregatedAttention(
                        dim,
                        num_heads=dim // head_dim,
                        sr_ratio=sr_ratios[i],
                        fixed_pool_size=fixed_pool_size,
                        window=window,
                        pretrain_side=pretrain_side,
                        impl=impl,
                    )
                blocks.append(TransNeXtBlock(dim, attn, mlp_ratio=mlp_ratios[i], drop_path=rate))
            down: nn.Module = nn.Identity()
            if i:
                conv = ConvNHWC(dims[i - 1], dim, 3, stride=2, padding=1)
                down = nn.Sequential(conv, LayerNorm(dim, eps=1e-5))
            self.stages.append(Stage(down, blocks, LayerNorm(dim, eps=1e-6)))
        self.norm = nn.Identity()  # every stage ends in its own
        self._set_bias_sizes(pair(img_size))
        self.apply(_init)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make the position biases for images of this size (side, or height and width), if they are interpolated."""
        self._set_bias_sizes(pair(img_size))
        update_model_input_size(self, self.img_size)

    def _set_bias_sizes(self, img_size: tuple[int, int]) -> None:
        H, W = self.img_size = img_size
        if min(H, W) < 1:
            raise ValueError(f"img_size must be positive, got {img_size}")
        for i, stage in enumerate(self.stages):
            stride = 4 * 2**i
            size = (math.ceil(H / stride), math.ceil(W / stride))
            for block in stage.blocks:
                block.attn.set_bias_size(size if self.bias_mode == "interpolate" else None)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


ARCHS: dict[str, dict[str, Any]] = {
    "transnext_micro": {},
    "transnext_t": {"dims": (72, 144, 288, 576)},
    "transnext_s": {"dims": (72, 144, 288, 576), "depths": (5, 5, 22, 5)},
    "transnext_b": {"dims": (96, 192, 384, 768), "depths": (5, 5, 23, 5)},
    "transnext_micro_aaaa": {"sr_ratios": (16, 8, 4, 2), "img_size": 256, "pretrain_size": 256},
}

_SOURCE = {
    "license": "apache-2.0",
    "paper_ids": "arXiv:2311.17132",
    "origin_url": "https://github.com/DaiShiResearch/TransNeXt",
}

default_cfgs = generate_default_cfgs(
    {
        **{f"{name}.in1k": cfg(**_SOURCE) for name in ARCHS if name != "transnext_micro_aaaa"},
        "transnext_micro_aaaa.in1k": cfg(**_SOURCE, input_size=(3, 256, 256), pool_size=(8, 8)),
    }
)


@register_model
def transnext_micro(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    return create(TransNeXt, ARCHS, "transnext_micro", pretrained, **kwargs)


@register_model
def transnext_t(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    return create(TransNeXt, ARCHS, "transnext_t", pretrained, **kwargs)


@register_model
def transnext_s(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    return create(TransNeXt, ARCHS, "transnext_s", pretrained, **kwargs)


@register_model
def transnext_b(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    return create(TransNeXt, ARCHS, "transnext_b", pretrained, **kwargs)


@register_model
def transnext_micro_aaaa(pretrained: bool = False, **kwargs: Any) -> TransNeXt:
    return create(TransNeXt, ARCHS, "transnext_micro_aaaa", pretrained, **kwargs)
