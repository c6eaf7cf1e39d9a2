"""LITv2: vision transformer with HiLo attention.

Paper: Pan et al., NeurIPS 2022, arXiv:2205.13213. Code: https://github.com/ziplab/LITv2 @ 7501c86 (Apache-2.0).
Departures: the classifier takes any size, by the padding of the authors' detection code: the image to whole patches,
maps to whole windows; the last row or column of a map of odd size is dropped between stages.
"""

import math
from functools import partial
from typing import Any

from timm.layers import DropPath, LayerNorm, PatchEmbed, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.layers.attention.hilo import HiLoAttention
from visionattn.layers.channels_last import depthwise
from visionattn.layers.deformable import DeformablePatchMerging
from visionattn.models._backbone import Backbone, Stage
from visionattn.models._create import cfg, create
from visionattn.ops import Impl


class ConvMlp(nn.Module):
    """MLP with a depthwise convolution before the activation. ``(B, H, W, C)`` to ``(B, H, W, C)``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = depthwise(hidden, 3)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.dwconv(self.fc1(x))))


class LITv2Block(nn.Module):
    """Attention (if any) and MLP, each after a norm and in a residual. ``(B, H, W, C)`` to ``(B, H, W, C)``."""

    def __init__(self, dim: int, attn: nn.Module | None, *, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=1e-5) if attn is not None else None
        self.attn = attn
        self.norm2 = LayerNorm(dim, eps=1e-5)
        self.mlp = ConvMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.attn is not None and self.norm1 is not None:
            x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class LITv2(Backbone):
    """LITv2: convolutional MLPs in the first two stages, HiLo attention in the third, full attention in the last.

    Args:
        dims: Channels by stage.
        depths: Blocks by stage.
        num_heads: Heads by stage.
        local_ws: Side of HiLo's windows by stage; 0 leaves attention out, 1 is full attention. The authors also use 4
            instead of 2 for detection, with the same weights.
        alpha: Share of low-frequency heads.
        mlp_ratio: Hidden width of the MLP over the channels.
        in_chans: Channels of the image.
        drop_path_rate: Rate of the last block; rises linearly from 0.
        impl: Implementation of the window attention operator.
        **head: ``num_classes``, ``global_pool``, ``drop_rate``.
    """

    official_rules = (
        (r"^patch_embed\.", "stem."),
        *((rf"^layers\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(3)),
        (r"\.downsample\.dconv\.conv_offset\.", ".downsample.offset."),
        (r"\.downsample\.dconv\.", ".downsample.conv."),
        (r"\.downsample\.norm_layer\.", ".downsample.norm."),
        (r"^layers\.(\d)\.", r"stages.\1."),
        (r"\.dwconv\.dwconv\.", ".dwconv."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    )

    def __init__(
        self,
        *,
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        local_ws: tuple[int, ...] = (0, 0, 2, 1),
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        impl: Impl = "auto",
        **head: Any,
    ) -> None:
        super().__init__(dims=dims, reductions=[4 * 2**i for i in range(len(dims))], in_chans=in_chans, **head)
        if not len(dims) == len(depths) == len(num_heads) == len(local_ws):
            raise ValueError(
                "dims, depths, num_heads and local_ws must be as long, "
                f"got {dims}, {depths}, {num_heads} and {local_ws}"
            )
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        norm = partial(LayerNorm, eps=1e-5)
        self.stem = PatchEmbed(
            None,
            4,
            in_chans,
            dims[0],
            norm_layer=norm,
            flatten=False,
            output_fmt="NHWC",
            strict_img_size=False,
            dynamic_img_pad=True,
        )
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks = []
            for rate in rates[i]:
                attn = None
                if local_ws[i]:
                    attn = HiLoAttention(dim, num_heads=num_heads[i], window=local_ws[i], alpha=alpha, impl=impl)
                blocks.append(LITv2Block(dim, attn, mlp_ratio=mlp_ratio, drop_path=rate))
            self.stages.append(Stage(DeformablePatchMerging(dims[i - 1], dim) if i else nn.Identity(), blocks))
        self.norm = norm(dims[-1])
        self.apply(_init)

    def _last_side(self, pixels: int) -> int:
        return -(-pixels // 4) // (self._last_reduction() // 4)  # patches are padded, maps are not


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / math.prod(module.kernel_size)))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


B: dict[str, Any] = {"dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}

ARCHS: dict[str, dict[str, Any]] = {"litv2_s": {}, "litv2_m": {"depths": (2, 2, 18, 2)}, "litv2_b": B, "litv2_b_384": B}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return cfg(
        license="apache-2.0",
        paper_ids="arXiv:2205.13213",
        origin_url="https://github.com/ziplab/LITv2",
        first_conv="stem.proj",
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        "litv2_s.in1k": _cfg(),
        "litv2_m.in1k": _cfg(),
        "litv2_b.in1k": _cfg(),
        "litv2_b_384.in1k": _cfg(input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0, crop_mode="squash"),
    }
)


@register_model
def litv2_s(pretrained: bool = False, **kwargs: Any) -> LITv2:
    return create(LITv2, ARCHS, "litv2_s", pretrained, **kwargs)


@register_model
def litv2_m(pretrained: bool = False, **kwargs: Any) -> LITv2:
    return create(LITv2, ARCHS, "litv2_m", pretrained, **kwargs)


@register_model
def litv2_b(pretrained: bool = False, **kwargs: Any) -> LITv2:
    return create(LITv2, ARCHS, "litv2_b", pretrained, **kwargs)


@register_model
def litv2_b_384(pretrained: bool = False, **kwargs: Any) -> LITv2:
    return create(LITv2, ARCHS, "litv2_b_384", pretrained, **kwargs)
