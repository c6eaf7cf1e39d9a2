"""Swin with a pluggable token mixer in place of window attention where one is given.

Paper: Liu et al., arXiv:2103.14030.
"""

from functools import partial
from typing import Any, ClassVar

from timm.layers import LayerNorm, PatchEmbed, resize_rel_pos_bias_table_simple
from torch import nn

from visionattn.layers.attention.window import WindowAttention
from visionattn.layers.patch import PatchMerging
from visionattn.models._backbone import Stage
from visionattn.models._checkpoint import Rules, StateDict
from visionattn.models._hosts._block import Host, MapBlock, Mixer, Size, init_linear, pair, stage_rates
from visionattn.ops import Impl

PATCH = 4


class Swin(Host):
    """Swin's layout around window attention and any mixer of maps.

    Any image size runs: images are padded to whole patches, maps to whole windows and to even size before merging.

    Args:
        mixer: Makes the mixer of block ``i`` of stage ``s``, ``(B, H, W, C)`` to the same shape, or returns None where
            the block keeps window attention, shifted in every second block.
        img_size: Images that tables of the mixers are for.
        dims: Channels by stage.
        depths: Blocks by stage.
        num_heads: Heads of window attention by stage.
        window_size: Side of a window; a 32nd of the image's, but 7 at least, if None.
        shift_single: Shift the window of a map that is a single window, too. The authors do so for detection and not
            for classification; None does so where ``num_classes`` is 0.
        mlp_ratio: Hidden width of the MLPs over the channels.
        in_chans: Channels of the image.
        num_classes: Classes; 0 leaves the classifier out.
        drop_path_rate: Rate of the last block; rises linearly from 0.
        impl: Implementation of window attention.
        **head: ``global_pool``, ``drop_rate``.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("relative_position_bias_table",)
    official_rules: Rules = (
        (r"relative_position_index$|attn_mask$", None),
        (r"^patch_embed\.", "stem."),
        (r"^layers\.2\.downsample\.", "stages.3.downsample."),
        (r"^layers\.1\.downsample\.", "stages.2.downsample."),
        (r"^layers\.0\.downsample\.", "stages.1.downsample."),
        (r"^layers\.", "stages."),
        (r"\.relative_position_bias_table$", ".bias.relative_position_bias_table"),
        (r"^norm[012]\.", None),  # detectors' norms of single stages
        (r"^norm3\.", "norm."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    )

    def __init__(
        self,
        *,
        mixer: Mixer,
        img_size: int | Size = 224,
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window_size: int | None = None,
        shift_single: bool | None = None,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        impl: Impl = "auto",
        **head: Any,
    ) -> None:
        reductions = [4 * 2**i for i in range(len(dims))]
        super().__init__(dims=dims, reductions=reductions, in_chans=in_chans, num_classes=num_classes, **head)
        if not len(dims) == len(depths) == len(num_heads):
            raise ValueError(f"dims, depths and num_heads must be as long, got {dims}, {depths} and {num_heads}")
        self.window_size = window = max(7, min(pair(img_size)) // 32) if window_size is None else window_size
        rates = stage_rates(drop_path_rate, depths)
        self.stem = PatchEmbed(
            None,
            PATCH,
            in_chans,
            dims[0],
            norm_layer=partial(LayerNorm, eps=1e-5),
            output_fmt="NHWC",
            strict_img_size=False,
            dynamic_img_pad=True,
        )
        self.stages = nn.ModuleList()
        for s, dim in enumerate(dims):
            blocks = []
            for i, rate in enumerate(rates[s]):
                attn = mixer(s, i) or WindowAttention(
                    dim,
                    num_heads=num_heads[s],
                    window=window,
                    shift=window // 2 if i % 2 else 0,
                    shift_single=num_classes == 0 if shift_single is None else shift_single,
                    impl=impl,
                )
                blocks.append(MapBlock(dim, attn, mlp_ratio=mlp_ratio, drop_path=rate, eps=1e-5))
            self.stages.append(Stage(PatchMerging(dims[s - 1], dim) if s else nn.Identity(), blocks))
        self.norm = LayerNorm(dims[-1], eps=1e-5)
        self.apply(init_linear)

    def fixed_by_size(self) -> dict[str, Any]:
        """The side of the windows."""
        return {"window_size": self.window_size}

    @staticmethod
    def map_sizes(img_size: int | Size) -> list[Size]:
        """Return the size of each stage's map for images of ``img_size``."""
        H, W = pair(img_size)
        return [(-(-H // stride), -(-W // stride)) for stride in (4, 8, 16, 32)]

    def reshape_official(self, state: StateDict) -> StateDict:
        """Resize the bias tables of windows of another size (bicubic)."""
        windows = {
            f"{name}.bias.relative_position_bias_table": m.window
            for name, m in self.named_modules()
            if isinstance(m, WindowAttention)
        }
        out = dict(state)
        for key, window in windows.items():
            if key in out and out[key].ndim == 2 and out[key].shape[0] != (2 * window - 1) ** 2:
                shape = ((2 * window - 1) ** 2, out[key].shape[1])
                out[key] = resize_rel_pos_bias_table_simple(out[key], (window, window), shape)
        return out
