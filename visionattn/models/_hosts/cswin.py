"""CSwin with a pluggable token mixer in place of stripe attention where one is given.

Paper: Dong et al., arXiv:2107.00652.
"""

from typing import Any

from timm.layers import LayerNorm
from torch import Tensor, nn

from visionattn.layers.attention.window import StripeAttention
from visionattn.layers.channels_last import ConvNHWC, ToNHWC
from visionattn.models._backbone import Stage
from visionattn.models._checkpoint import Rules
from visionattn.models._hosts._block import Host, MapBlock, Mixer, Size, init_linear, pair, stage_rates
from visionattn.ops import Impl


class CSwinBlock(MapBlock):
    """A `MapBlock` whose mixer may ask, by ``reads_input = True``, for the block's input besides its norm."""

    def mix(self, x: Tensor) -> Tensor:
        """Norm and mixer."""
        if getattr(self.attn, "reads_input", False):
            return self.attn(self.norm1(x), context=x)
        return super().mix(x)


class CSwin(Host):
    """CSwin's layout around stripe attention and any mixer of maps.

    Any image size runs: strided convolutions halve odd sizes upwards, and stripes are padded.

    Args:
        mixer: Makes the mixer of block ``i`` of stage ``s``, ``(B, H, W, C)`` to the same shape, or returns None where
            the block keeps stripe attention. A mixer whose ``reads_input`` is true is called with the block's input as
            ``context``.
        img_size: Images that tables of the mixers are for.
        dims: Channels by stage.
        depths: Blocks by stage.
        num_heads: Heads of stripe attention by stage.
        split_size: Width of a stripe; a 32nd of the image's side, but 7 at least, if None. The last stage has none.
        mlp_ratio: Hidden width of the MLPs over the channels.
        in_chans: Channels of the image.
        drop_path_rate: Rate of the last block; rises linearly from 0.
        impl: Implementation of stripe attention.
        **head: ``num_classes``, ``global_pool``, ``drop_rate``.
    """

    official_ema = True
    official_rules: Rules = (
        (r"^stage1_conv_embed\.0\.", "stem.0."),
        (r"^stage1_conv_embed\.2\.", "stem.2."),
        *((rf"^merge{i}\.conv\.", f"stages.{i}.downsample.0.") for i in (1, 2, 3)),
        *((rf"^merge{i}\.norm\.", f"stages.{i}.downsample.1.") for i in (1, 2, 3)),
        *((rf"^stage{i + 1}\.", f"stages.{i}.blocks.") for i in range(4)),
        (r"\.(\d+)\.(qkv|proj)\.", r".\1.attn.\2."),
        (r"\.attns\.(\d)\.get_v\.", r".attn.lepe.\1."),
        (r"\.attns\.0\.", ".attn."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    )

    def __init__(
        self,
        *,
        mixer: Mixer,
        img_size: int | Size = 224,
        dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 4, 18, 1),
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        split_size: int | None = None,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        impl: Impl = "auto",
        **head: Any,
    ) -> None:
        super().__init__(dims=dims, reductions=[4 * 2**i for i in range(len(dims))], in_chans=in_chans, **head)
        if not len(dims) == len(depths) == len(num_heads):
            raise ValueError(f"dims, depths and num_heads must be as long, got {dims}, {depths} and {num_heads}")
        self.split_size = split = max(7, min(pair(img_size)) // 32) if split_size is None else split_size
        rates = stage_rates(drop_path_rate, depths)
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, dims[0], 7, stride=4, padding=2), ToNHWC(), LayerNorm(dims[0], eps=1e-5)
        )
        self.stages = nn.ModuleList()
        for s, dim in enumerate(dims):
            downsample: nn.Module = nn.Identity()
            if s:
                conv = ConvNHWC(dims[s - 1], dim, 3, stride=2, padding=1)
                downsample = nn.Sequential(conv, LayerNorm(dim, eps=1e-5))
            blocks = []
            for i, rate in enumerate(rates[s]):
                stripe = None if s == len(dims) - 1 else split
                attn = mixer(s, i) or StripeAttention(dim, num_heads=num_heads[s], split=stripe, impl=impl)
                blocks.append(CSwinBlock(dim, attn, mlp_ratio=mlp_ratio, drop_path=rate, eps=1e-5))
            self.stages.append(Stage(downsample, blocks))
        self.norm = LayerNorm(dims[-1], eps=1e-5)
        self.apply(init_linear)

    def _last_side(self, pixels: int) -> int:
        return -(
            -((pixels + 1) // 4) // (self._last_reduction() // 4)
        )  # the first convolution does not pad to the full

    def fixed_by_size(self) -> dict[str, Any]:
        """The width of the stripes."""
        return {"split_size": self.split_size}

    @staticmethod
    def map_sizes(img_size: int | Size) -> list[Size]:
        """Return the size of each stage's map for images of ``img_size``."""
        H, W = pair(img_size)
        size, sizes = ((H - 3) // 4 + 1, (W - 3) // 4 + 1), []
        for _ in range(4):
            sizes.append(size)
            size = (-(-size[0] // 2), -(-size[1] // 2))
        return sizes
