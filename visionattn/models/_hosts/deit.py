"""The plain vision transformer (ViT, DeiT) with a pluggable token mixer.

Papers: Dosovitskiy et al., arXiv:2010.11929; Touvron et al., arXiv:2012.12877.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from timm.layers import (
    DropPath,
    LayerNorm,
    Mlp,
    PatchEmbed,
    calculate_drop_path_rates,
    resample_abs_pos_embed,
    trunc_normal_,
)
from torch import Tensor, nn

from visionattn.layers.sized import SizedTables
from visionattn.models._backbone import Backbone, update_model_input_size
from visionattn.models._checkpoint import StateDict
from visionattn.models._hosts._block import Size, init_linear, pair


class ViTBlock(nn.Module):
    """Mixer and MLP, each after a norm and in a residual. ``(B, P + H * W, C)`` to the same shape.

    Args:
        dim: Channels.
        mixer: Called with the tokens and the size ``(H, W)`` of their map; the ``P`` prefix tokens come first.
        mlp_ratio: Hidden width of the MLP over the channels.
        drop_path: Rate of stochastic depth.
        eps: Of the norms.
    """

    def __init__(self, dim: int, mixer: nn.Module, *, mlp_ratio: float, drop_path: float, eps: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=eps)
        self.attn = mixer
        self.norm2 = LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, size: Size) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PlainViT(Backbone):
    """Patches, a class token, a learned position embedding, equal blocks, a classifier on the class token.

    Any image size runs: the image is zero-padded at the bottom and right to whole patches, the position embedding
    resized (bicubic, as timm does).

    Args:
        mixer: Makes the token mixer of block ``i``.
        img_size: Side of the images that the position embedding is for.
        patch_size: Side of a patch.
        dim: Channels.
        depth: Blocks.
        mlp_ratio: Hidden width of the MLPs over the channels.
        eps: Of the norms.
        representation_size: Width of a linear layer and tanh before the classifier; none if None.
        in_chans: Channels of the image.
        global_pool: ``"token"`` (the class token), ``"avg"`` (mean of the patch tokens) or ``""``.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Rate of the last block; rises linearly from 0.
        num_classes: Classes; 0 leaves the classifier out.
    """

    isotropic: ClassVar[bool] = True
    no_decay: ClassVar[tuple[str, ...]] = ("cls_token", "pos_embed")

    def __init__(
        self,
        *,
        mixer: Callable[[int], nn.Module],
        img_size: int | Size = 224,
        patch_size: int = 16,
        dim: int = 384,
        depth: int = 12,
        mlp_ratio: float = 4.0,
        eps: float = 1e-6,
        representation_size: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(dims=[dim] * depth, reductions=[patch_size] * depth, in_chans=in_chans, num_classes=0)
        self.stem = PatchEmbed(
            _whole(img_size, patch_size),
            patch_size,
            in_chans,
            dim,
            flatten=False,
            strict_img_size=False,
            dynamic_img_pad=True,
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.stem.num_patches, dim))
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        self.stages = nn.ModuleList(
            ViTBlock(dim, mixer(i), mlp_ratio=mlp_ratio, drop_path=rate, eps=eps) for i, rate in enumerate(rates)
        )
        self.norm = LayerNorm(dim, eps=eps)
        self.pre_logits = nn.Linear(dim, representation_size) if representation_size else None
        self.head_hidden_size = representation_size or dim
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)
        self.apply(init_linear)
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        x = self.stem(x)  # (B, C, H, W)
        B, _, H, W = x.shape
        x = x.flatten(2).transpose(1, 2)  # (B, N, C)
        pos: Tensor = self.pos_embed
        if self.stem.grid_size != (H, W):
            pos = _resize(pos, self.stem.grid_size, (H, W))
        return torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1) + pos, ((H, W),)

    def _nchw(self, x: Tensor, *args: Any) -> Tensor:
        (size,) = args
        return x[:, 1:].transpose(1, 2).unflatten(2, size)

    def _final(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normed tokens ``(B, 1 + H * W / patch_size ** 2, dim)``, the class token first."""
        return super().forward_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify what `forward_features` returned."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, 1:].mean(dim=1)
        if self.pre_logits is not None:
            x = self.pre_logits(x).tanh()
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def set_input_size(self, img_size: int | Size) -> None:
        """Make the position embedding and the mixers' tables, resized, those of images of ``img_size``.

        For fine-tuning at that size. Any size runs without this: they are then resized in every forward pass.
        """
        old = self.stem.grid_size
        self.stem.set_input_size(_whole(img_size, self.stem.patch_size[0]))
        new = self.stem.grid_size
        if new != old:
            pos = self.pos_embed
            shape = (1, 1 + self.stem.num_patches, pos.shape[-1])
            resized = pos.new_empty(shape) if pos.is_meta else _resize(pos.detach(), old, new)
            self.pos_embed = nn.Parameter(resized, requires_grad=pos.requires_grad)
        for module in self.stages.modules():
            if isinstance(module, SizedTables):
                module.set_size(new)
        update_model_input_size(self, pair(img_size))

    def from_official(self, state: StateDict) -> StateDict:
        """Rename the authors' keys; resize a position embedding that is for square images of another size."""
        state = super().from_official(state)
        pos = state.get("pos_embed")
        if pos is not None and pos.shape[1] != self.pos_embed.shape[1]:
            side = math.isqrt(pos.shape[1] - 1)
            if side**2 == pos.shape[1] - 1:
                state = {**state, "pos_embed": _resize(pos, (side, side), self.stem.grid_size)}
        return state

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one of ``num_classes`` (0 for none), and the pooling if named."""
        if global_pool is not None:
            if global_pool not in ("token", "avg", ""):
                raise ValueError(f"global_pool must be 'token', 'avg' or '', got {global_pool!r}")
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = self.pos_embed
        self.head = (
            nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )


def _whole(img_size: int | Size, patch: int) -> Size:
    """``(H, W)`` of images of ``img_size`` padded to whole patches."""
    H, W = pair(img_size)
    return (-(-H // patch) * patch, -(-W // patch) * patch)


def _resize(pos: Tensor, old: Size, new: Size) -> Tensor:
    """Bring a position embedding ``(1, 1 + H * W, C)`` from one grid to another; the class token's stays."""
    return resample_abs_pos_embed(pos, new_size=list(new), old_size=list(old))
