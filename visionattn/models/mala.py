"""MAViT: vision transformer with magnitude-aware linear attention (MALA).

Paper: Fan et al., ICCV 2025, arXiv:2507.00698. Code: https://github.com/qhfan/MALA @ 7114e63 (no licence file).
As released, every variant attends linearly in stages 1 and 2 and by softmax in stages 3 and 4 (``kinds``).
Departures: the projection before pooling is ``norm`` here, so `forward_features` returns the projected map.
"""

from typing import Any, Literal

from timm.layers import ClassifierHead, DropPath, LayerNorm, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, full, nn

from visionattn.layers.attention.linear import MagnitudeAwareAttention
from visionattn.layers.channels_last import BatchNormNHWC, ConvNHWC, ToNHWC, depthwise
from visionattn.models._backbone import Backbone, Stage
from visionattn.models._create import cfg, create
from visionattn.ops import Impl

Kind = Literal["linear", "softmax"]


class MALAMlp(nn.Module):
    """MLP with a depthwise convolution of the hidden map, added to it. ``(B, H, W, C)`` to ``(B, H, W, C)``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.dwconv = depthwise(hidden, 3)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


class MALABlock(nn.Module):
    """Position convolution, attention and MLP, each a residual. ``(B, H, W, C)`` to ``(B, H, W, C)``."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        kind: Kind,
        mlp_ratio: float,
        layer_scale: float,
        drop_path: float,
        impl: Impl,
    ) -> None:
        super().__init__()
        self.pos = depthwise(dim, 3)
        self.norm1 = LayerNorm(dim, eps=1e-6)
        self.attn = MagnitudeAwareAttention(dim, num_heads=num_heads, kind=kind, impl=impl)
        self.norm2 = LayerNorm(dim, eps=1e-6)
        self.mlp = MALAMlp(dim, int(dim * mlp_ratio))
        # Two axes, so that weight decay reaches the scales, as in the authors' training.
        self.gamma_1 = nn.Parameter(full((1, dim), layer_scale))
        self.gamma_2 = nn.Parameter(full((1, dim), layer_scale))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos(x)
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma_2 * self.mlp(self.norm2(x)))


class MALA(Backbone):
    """MAViT, four stages. Convolutions pad, so that any size runs, as in the authors' code.

    Args:
        dims: Channels by stage.
        depths: Blocks by stage.
        num_heads: Heads by stage.
        kinds: Attention by stage, ``"linear"`` or ``"softmax"``.
        mlp_ratio: Hidden width of the MLP over the channels.
        layer_scale: Initial scale of the residual branches, by stage.
        projection: Width before the classifier.
        in_chans: Channels of the image.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: timm's pooling names; ``""`` leaves pooling out.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Rate of the last block; rises linearly from 0.
        impl: Implementation of the attention operator.
    """

    official_rules = (
        (r"RoPE\.angle$", None),
        (r"^norm\.", "norm.1."),
        (r"^proj\.", "norm.0."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
        (r"^patch_embed\.proj\.", "stem."),
        *(
            (rf"^layers\.{i}\.downsample\.{name}\.", f"stages.{i + 1}.downsample.{j}.")
            for i in range(3)
            for j, name in enumerate(("reduction", "norm"))
        ),
        (r"^layers\.(\d)\.", r"stages.\1."),
        (r"\.norm([12])\.norm\.", r".norm\1."),
        (r"\.ffn\.", ".mlp."),
    )

    def __init__(
        self,
        *,
        dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (1, 2, 4, 8),
        kinds: tuple[Kind, ...] = ("linear", "linear", "softmax", "softmax"),
        mlp_ratio: float = 3.5,
        layer_scale: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0),
        projection: int = 2048,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        impl: Impl = "auto",
    ) -> None:
        super().__init__(
            dims=dims, reductions=[4 * 2**i for i in range(len(dims))], in_chans=in_chans, num_classes=num_classes
        )
        if not len(dims) == len(depths) == len(num_heads) == len(kinds) == len(layer_scale):
            raise ValueError(
                "dims, depths, num_heads, kinds and layer_scale must be as long, "
                f"got {dims}, {depths}, {num_heads}, {kinds} and {layer_scale}"
            )
        rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stem = _stem(in_chans, dims[0])
        self.stages = nn.ModuleList()
        for i, dim in enumerate(dims):
            blocks = [
                MALABlock(
                    dim,
                    num_heads=num_heads[i],
                    kind=kinds[i],
                    mlp_ratio=mlp_ratio,
                    layer_scale=layer_scale[i],
                    drop_path=rate,
                    impl=impl,
                )
                for rate in rates[i]
            ]
            self.stages.append(Stage(_downsample(dims[i - 1], dim) if i else nn.Identity(), blocks))
        self.norm = nn.Sequential(nn.Linear(dims[-1], projection), BatchNormNHWC(projection), nn.SiLU())
        self.num_features = self.head_hidden_size = projection
        self.head = ClassifierHead(projection, num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.apply(_init)


def _stem(in_chans: int, dim: int) -> nn.Sequential:
    """Image to the first map, stride 4: ``(B, in_chans, H, W)`` to ``(B, H / 4, W / 4, dim)``."""
    layers: list[nn.Module] = []
    for chans, out, stride in ((in_chans, dim // 2, 2), (dim // 2, dim // 2, 1), (dim // 2, dim // 2, 1)):
        layers += [nn.Conv2d(chans, out, 3, stride=stride, padding=1), nn.BatchNorm2d(out), nn.GELU()]
    layers += [nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1), nn.BatchNorm2d(dim), ToNHWC()]
    return nn.Sequential(*layers)


def _downsample(dim: int, out_dim: int) -> nn.Sequential:
    """Half the size (rounded up): ``(B, H, W, dim)`` to ``(B, H / 2, W / 2, out_dim)``."""
    return nn.Sequential(ConvNHWC(dim, out_dim, 3, stride=2, padding=1), BatchNormNHWC(out_dim))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


ARCHS: dict[str, dict[str, Any]] = {
    "mala_t": {},
    "mala_s": {"dims": (64, 128, 320, 512), "depths": (3, 5, 9, 3), "num_heads": (1, 2, 5, 8)},
    "mala_b": {
        "dims": (96, 192, 384, 512),
        "depths": (4, 6, 12, 6),
        "num_heads": (1, 2, 6, 8),
        "layer_scale": (1.0, 1.0, 1e-6, 1e-6),
    },
    "mala_l": {
        "dims": (96, 192, 448, 640),
        "depths": (4, 7, 19, 8),
        "num_heads": (1, 2, 7, 10),
        "layer_scale": (1e-6, 1e-6, 1e-6, 1e-6),
        "projection": 2560,
    },
}

default_cfgs = generate_default_cfgs(
    {
        f"{name}.in1k": cfg(license="none", paper_ids="arXiv:2507.00698", origin_url="https://github.com/qhfan/MALA")
        for name in ARCHS
    }
)


@register_model
def mala_t(pretrained: bool = False, **kwargs: Any) -> MALA:
    return create(MALA, ARCHS, "mala_t", pretrained, **kwargs)


@register_model
def mala_s(pretrained: bool = False, **kwargs: Any) -> MALA:
    return create(MALA, ARCHS, "mala_s", pretrained, **kwargs)


@register_model
def mala_b(pretrained: bool = False, **kwargs: Any) -> MALA:
    return create(MALA, ARCHS, "mala_b", pretrained, **kwargs)


@register_model
def mala_l(pretrained: bool = False, **kwargs: Any) -> MALA:
    return create(MALA, ARCHS, "mala_l", pretrained, **kwargs)
