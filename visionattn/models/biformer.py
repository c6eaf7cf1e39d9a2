"""BiFormer: vision transformer with bi-level routing attention.

Paper: Zhu et al., CVPR 2023, arXiv:2303.08810. Code: https://github.com/rayleizhu/BiFormer @ 1697bbb (MIT).
Departures: any input size runs, by the padding that the authors define for detection (``auto_pad``); in
``biformer_stl_nchw``, maps under 7 tokens a side have regions of one token.
"""

from typing import Any, Literal

from timm.layers import DropPath, LayerNorm, Mlp, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.layers.attention.routed import LePEAttention, RoutingAttention
from visionattn.layers.channels_last import BatchNormNHWC, ConvNHWC, ToNHWC, depthwise
from visionattn.models._backbone import Backbone, Stage
from visionattn.models._create import cfg, create
from visionattn.ops import Impl

Style = Literal["biformer", "stl", "stl_nchw"]


class BiFormerBlock(nn.Module):
    """Position convolution (if any), attention, MLP, each a residual. ``(B, H, W, C)`` to ``(B, H, W, C)``."""

    def __init__(self, dim: int, attn: nn.Module, *, mlp_ratio: float, conv_pos: bool, drop_path: float) -> None:
        super().__init__()
        self.pos_embed = depthwise(dim, 3) if conv_pos else None
        self.norm1 = LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class BiFormer(Backbone):
    """BiFormer, four stages: routing attention in the first three, full attention in the last.

    Args:
        dims: Channels by stage.
        depths: Blocks by stage.
        topk: Regions routed to, by stage; -1 is full attention.
        n_win: Regions along each side of a map: 7 for classification; the authors use 16 for detection, 8 for
            segmentation.
        head_dim: Channels of a head where attention is routed. Full attention always has 8 heads.
        mlp_ratio: Hidden width of the MLP over the channels.
        style: ``"biformer"``, or the Swin-T layout ablation ``"stl"`` with the first implementation of routing
            (as BiFormer's) or ``"stl_nchw"`` with the second.
        drop_path_rate: Rate of the last block; rises linearly from 0.
        impl: Implementation of the attention operator.
        **head: ``in_chans``, ``num_classes``, ``global_pool``, ``drop_rate``.
    """

    official_rules = (
        (r"^downsample_layers\.0\.", "stem."),
        (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
        (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"\.attn\.(?:qkv\.qkv|qkv_linear)\.", ".attn.qkv."),
        (r"\.attn\.(?:wo|output_linear)\.", ".attn.proj."),
        (r"\.mlp\.0\.", ".mlp.fc1."),
        (r"\.mlp\.[23]\.", ".mlp.fc2."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    )

    def __init__(
        self,
        *,
        dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 2, 8, 2),
        topk: tuple[int, ...] = (1, 4, 16, -1),
        n_win: int = 7,
        head_dim: int = 32,
        mlp_ratio: float = 3.0,
        style: Style = "biformer",
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        impl: Impl = "auto",
        **head: Any,
    ) -> None:
        super().__init__(dims=dims, reductions=[4 * 2**i for i in range(len(dims))], in_chans=in_chans, **head)
        if not len(dims) == len(depths) == len(topk):
            raise ValueError(f"dims, depths and topk must be as long, got {dims}, {depths} and {topk}")
        self.pads = style == "biformer"  # the others drop what a stride leaves over
        second = style == "stl_nchw"
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stem = _stem(in_chans, dims[0], style)
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks = []
            for rate in rates[i]:
                attn: nn.Module
                if topk[i] < 0:
                    attn = LePEAttention(dim, lepe_on="values" if second else "input")
                else:
                    attn = RoutingAttention(
                        dim,
                        num_heads=dim // head_dim,
                        n_win=n_win,
                        topk=topk[i],
                        padding="qkv" if second else "input",
                        impl=impl,
                    )
                conv_pos = style == "biformer"
                blocks.append(BiFormerBlock(dim, attn, mlp_ratio=mlp_ratio, conv_pos=conv_pos, drop_path=rate))
            self.stages.append(Stage(_downsample(dims[i - 1], dim, style) if i else nn.Identity(), blocks))
        self.norm = BatchNormNHWC(dims[-1])
        self.apply(_init)

    def _last_side(self, pixels: int) -> int:
        return super()._last_side(pixels) if self.pads else pixels // self._last_reduction()


def _stem(in_chans: int, dim: int, style: Style) -> nn.Sequential:
    """Image to the first map, stride 4: ``(B, in_chans, H, W)`` to ``(B, H / 4, W / 4, dim)``."""
    if style != "biformer":
        return nn.Sequential(nn.Conv2d(in_chans, dim, 4, stride=4), nn.BatchNorm2d(dim), ToNHWC())
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1),
        nn.BatchNorm2d(dim // 2),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        nn.BatchNorm2d(dim),
        ToNHWC(),
    )


def _downsample(dim: int, out_dim: int, style: Style) -> nn.Sequential:
    """Half the size, twice the width: ``(B, H, W, dim)`` to ``(B, H / 2, W / 2, out_dim)``."""
    if style != "biformer":
        return nn.Sequential(BatchNormNHWC(dim), ConvNHWC(dim, out_dim, 2, stride=2))
    return nn.Sequential(ConvNHWC(dim, out_dim, 3, stride=2, padding=1), BatchNormNHWC(out_dim))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


ARCHS: dict[str, dict[str, Any]] = {
    "biformer_t": {},
    "biformer_s": {"depths": (4, 4, 18, 4)},
    "biformer_b": {"depths": (4, 4, 18, 4), "dims": (96, 192, 384, 768)},
    "biformer_stl": {"depths": (2, 2, 6, 2), "dims": (96, 192, 384, 768), "mlp_ratio": 4.0, "style": "stl"},
    "biformer_stl_nchw": {"depths": (2, 2, 6, 2), "dims": (96, 192, 384, 768), "mlp_ratio": 4.0, "style": "stl_nchw"},
}

default_cfgs = generate_default_cfgs(
    {
        f"{name}.in1k": cfg(
            license="mit", paper_ids="arXiv:2303.08810", origin_url="https://github.com/rayleizhu/BiFormer"
        )
        for name in ARCHS
    }
)


@register_model
def biformer_t(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    return create(BiFormer, ARCHS, "biformer_t", pretrained, **kwargs)


@register_model
def biformer_s(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    return create(BiFormer, ARCHS, "biformer_s", pretrained, **kwargs)


@register_model
def biformer_b(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    return create(BiFormer, ARCHS, "biformer_b", pretrained, **kwargs)


@register_model
def biformer_stl(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    return create(BiFormer, ARCHS, "biformer_stl", pretrained, **kwargs)


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    return create(BiFormer, ARCHS, "biformer_stl_nchw", pretrained, **kwargs)
