"""The pyramid vision transformer with a pluggable token mixer: four stages of patches with position embeddings.

Paper: Wang et al., arXiv:2102.12122. There is neither the class token nor the norm of the original at its end.
"""

from math import isqrt
from typing import Any

import torch
from timm.layers import LayerNorm
from torch import nn

from visionattn.layers.channels_last import ConvNHWC, ToNHWC
from visionattn.layers.sized import PositionEmbedding
from visionattn.models._backbone import Stage
from visionattn.models._checkpoint import Rules, StateDict
from visionattn.models._hosts._block import Host, MapBlock, Mixer, Size, init_linear, pair, stage_rates

STRIDES = (4, 2, 2, 2)


class PVT(Host):
    """PVT's layout around any mixer of maps.

    Any image size runs: rows and columns that do not fill a patch are left out, and position embeddings resized.

    Args:
        mixer: Makes the mixer of block ``i`` of stage ``s``, ``(B, H, W, C)`` to the same shape.
        img_size: Images that the position embeddings are for.
        dims: Channels by stage.
        depths: Blocks by stage.
        mlp_ratios: Hidden width of the MLPs over the channels, by stage.
        in_chans: Channels of the image.
        drop_path_rate: Rate of the last block; rises linearly from 0.
        **head: ``num_classes``, ``global_pool``, ``drop_rate``.
    """

    official_rules: Rules = (
        (r"^patch_embed1\.proj\.", "stem.0."),
        (r"^patch_embed1\.norm\.", "stem.2."),
        (r"^pos_embed1$", "stem.3.weight"),
        (r"^patch_embed(\d)\.proj\.", r"stages.\1.downsample.0."),
        (r"^patch_embed(\d)\.norm\.", r"stages.\1.downsample.1."),
        (r"^pos_embed(\d)$", r"stages.\1.downsample.2.weight"),
        (r"^block(\d)\.", r"stages.\1.blocks."),
        *((rf"^stages\.{i + 1}\.", f"stages.{i}.") for i in range(4)),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    )

    def __init__(
        self,
        *,
        mixer: Mixer,
        img_size: int | Size = 224,
        dims: tuple[int, ...] = (64, 128, 320, 512),
        depths: tuple[int, ...] = (2, 2, 2, 2),
        mlp_ratios: tuple[float, ...] = (8, 8, 4, 4),
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        **head: Any,
    ) -> None:
        super().__init__(dims=dims, reductions=[4 * 2**i for i in range(len(dims))], in_chans=in_chans, **head)
        if not len(dims) == len(depths) == len(mlp_ratios):
            raise ValueError(f"dims, depths and mlp_ratios must be as long, got {dims}, {depths} and {mlp_ratios}")
        sizes = self.map_sizes(img_size)
        rates = stage_rates(drop_path_rate, depths)
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, dims[0], STRIDES[0], stride=STRIDES[0]),
            ToNHWC(),
            LayerNorm(dims[0], eps=1e-5),
            PositionEmbedding(dims[0], sizes[0]),
        )
        self.stages = nn.ModuleList()
        for s, (dim, ratio) in enumerate(zip(dims, mlp_ratios, strict=True)):
            downsample: nn.Module = nn.Identity()
            if s:
                downsample = nn.Sequential(
                    ConvNHWC(dims[s - 1], dim, STRIDES[s], stride=STRIDES[s]),
                    LayerNorm(dim, eps=1e-5),
                    PositionEmbedding(dim, sizes[s]),
                )
            blocks = []
            for i, rate in enumerate(rates[s]):
                attn = mixer(s, i)
                if attn is None:
                    raise ValueError(f"PVT has no attention of its own: mixer must make one for block {i} of stage {s}")
                blocks.append(MapBlock(dim, attn, mlp_ratio=ratio, drop_path=rate, eps=1e-6))
            self.stages.append(Stage(downsample, blocks))
        self.norm = nn.Identity()
        self.apply(init_linear)

    def _last_side(self, pixels: int) -> int:
        return pixels // self._last_reduction()

    @staticmethod
    def map_sizes(img_size: int | Size) -> list[Size]:
        """Return the size of each stage's map for images of ``img_size``."""
        size, sizes = pair(img_size), []
        for stride in STRIDES:
            size = (size[0] // stride, size[1] // stride)
            sizes.append(size)
        return sizes

    def reshape_official(self, state: StateDict) -> StateDict:
        """Join queries with keys and values in one projection; make maps of the position embeddings."""
        out = {}
        for key, x in state.items():
            if ".attn.q." in key:
                out[key.replace(".q.", ".qkv.")] = torch.cat([x, state[key.replace(".q.", ".kv.")]])
            elif key.endswith("downsample.2.weight") or key == "stem.3.weight":
                out[key] = x.reshape(isqrt(x.shape[1]), -1, x.shape[2]) if x.shape[0] == 1 else x
            elif ".attn.kv." not in key:
                out[key] = x
        return out
