"""``fuse``: run the attention of timm's own models on this library's operators, without changing what they compute.

Each fused class is timm's class with another ``forward``. A model's modules become fused in place: parameters, state
dict keys, hooks and training mode stay, and a checkpoint of one fits the other.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import checkpoint
from timm.models.convit import GPSA, MHSA, Block, ConVit
from timm.models.davit import ChannelAttention, ChannelAttentionV2, ChannelBlock, ConvPosEnc, SpatialBlock
from timm.models.maxxvit import PartitionAttentionCl
from timm.models.shvit import SHSA
from torch import Tensor, nn
from torch.nn import functional as F

from visionattn.layers.padding import pad_to_windows
from visionattn.models._davit import (
    FusedChannelAttention,
    FusedChannelAttentionV2,
    FusedChannelBlock,
    FusedConvPosEnc,
    FusedSpatialBlock,
)
from visionattn.ops import gated_positional_attention, get_impl, window_attention
from visionattn.ops._crossovers import CROSSOVERS, first_wins
from visionattn.ops._dispatch import exporting

_logger = logging.getLogger(__name__)

Size = tuple[int, int]
PRODUCTS_WIN = "SHViT's attention: tokens; two products, fused attention of transposed tokens"
_PRODUCTS_ON_CPU = CROSSOVERS[PRODUCTS_WIN, "cpu", None].upto


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did to a model.

    Attributes:
        replaced: Operator that each fused module runs on, by the module's name.
        left: Why each other attention module was left as it is, by its name.
    """

    replaced: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"fused {len(self.replaced)} modules, left {len(self.left)}"]
        lines += [f"  {name}: {operator}" for name, operator in self.replaced.items()]
        lines += [f"  {name}: left, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def fuse(model: nn.Module, *, fold_batchnorm: bool = False) -> nn.Module:
    """Run the attention of timm's MaxViT, DaViT, ConViT and SHViT on this library's operators, in place.

    Outputs and gradients stay equal up to rounding, and state dict keys stay as they are. ConViT gains what timm's
    class lacks: any input size, square or not, and gradient checkpointing. MaxViT takes any size, too: maps that
    windows do not divide are padded. What was replaced and what was left is
    logged, and `fuse_report` tells it.

    Args:
        model: A model of timm; any other module is searched for attention of those families.
        fold_batchnorm: Also fold batch norms into convolutions, where timm can (SHViT). This is for inference: it
            changes state dict keys and ends training.

    Returns:
        ``model``.
    """
    for module in model.modules():
        fused = FUSED.get(type(module))
        if fused is not None and (not fused.operator or _refusal(module) is None):
            module.__class__ = fused.cls
    if fold_batchnorm and hasattr(model, "fuse"):
        model.eval()
        model.fuse()
    _logger.info("%s", fuse_report(model))
    return model


def fuse_report(model: nn.Module) -> FuseReport:
    """Tell which attention modules of ``model`` run on this library's operators, and why others do not."""
    operators = {fused.cls: fused.operator for fused in FUSED.values() if fused.operator}
    carriers = {cls for timms, fused in FUSED.items() if not fused.operator for cls in (timms, fused.cls)}
    replaced, left = {}, {}
    for name, module in model.named_modules():
        if type(module) in operators:
            replaced[name] = operators[type(module)]
        elif type(module) in carriers:
            continue
        elif type(module) in FUSED:
            left[name] = _refusal(module) or "fuse() has not been called since it was added"
        elif isinstance(getattr(module, "qkv", None), nn.Module) and not any(
            name.startswith(f"{n}.") for n in replaced
        ):
            left[name] = f"{type(module).__name__} is not of a family that fuse() knows"
    return FuseReport(replaced, left)


def _refusal(module: nn.Module) -> str | None:
    drop = getattr(module, "attn_drop", None) or getattr(getattr(module, "attn", None), "attn_drop", None)
    if isinstance(drop, nn.Dropout) and drop.p > 0:
        return f"attention dropout of {drop.p} needs the matrix of weights"
    return None


def _heads(x: Tensor, heads: int) -> Tensor:
    """``(B, H, W, C)`` to ``(B, heads, H, W, C / heads)``."""
    return x.unflatten(-1, (heads, -1)).permute(0, 3, 1, 2, 4)


class FusedGPSA(GPSA):
    """ConViT's gated positional attention on `gated_positional_attention`, on a map of any size."""

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        """Mix the tokens ``(B, H * W, C)`` of a map of ``size``; a square one if None."""
        H, W = size or (int(x.shape[1] ** 0.5),) * 2
        x = x.unflatten(1, (H, W))  # (B, H, W, C)
        q, k = self.qk(x).chunk(2, dim=-1)
        q, k, v = (_heads(t, self.num_heads) for t in (q, k, self.v(x)))
        gate = self.gating_param.sigmoid()
        y = gated_positional_attention(q, k, v, self.pos_proj.weight, gate, bias=self.pos_proj.bias, scale=self.scale)
        return self.proj_drop(self.proj(y.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)))


class FusedMHSA(MHSA):
    """ConViT's plain attention on PyTorch's fused one."""

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        """Mix the tokens ``(B, N, C)``; the size of their map does not matter."""
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # 3 x (B, h, N, d)
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(y))


class FusedConVitBlock(Block):
    """ConViT's block; hands the size of the map to the attention."""

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        """Mix the tokens ``(B, N, C)`` of a map of ``size``."""
        known = isinstance(self.attn, (FusedGPSA, FusedMHSA))
        y = self.norm1(x)
        x = x + self.drop_path(self.attn(y, size) if known else self.attn(y))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class FusedConVit(ConVit):
    """ConViT for images of any size: zero-padded to whole patches, the position embedding resized."""

    grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep no activations inside blocks; compute them again in the backward pass."""
        self.grad_checkpointing = enable

    def _run(self, x: Tensor, visit: Callable[[int, Tensor, Size], None] | None = None, last: int = -1) -> Tensor:
        """Run the blocks, or those up to number ``last``; ``visit`` sees the patch tokens after each."""
        patch = self.patch_embed
        (height, width), dtype = patch.patch_size, x.dtype
        x = patch.proj(F.pad(x, (0, -x.shape[3] % width, 0, -x.shape[2] % height)))  # (B, C, H, W)
        size = (x.shape[2], x.shape[3])
        x = patch.norm(x.flatten(2).transpose(1, 2))  # (B, N, C)
        if self.use_pos_embed:
            pos = self.pos_embed
            if size != tuple(patch.grid_size):
                pos = resample_abs_pos_embed(pos, list(size), list(patch.grid_size), num_prefix_tokens=0)
            x = x + pos.to(dtype) if pos.dtype != x.dtype else x + pos
        x = self.pos_drop(x)
        blocks = self.blocks if last < 0 else self.blocks[: last + 1]
        for i, block in enumerate(blocks):
            if i == self.local_up_to_layer and self.cls_token is not None:
                x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
            keep = not (self.grad_checkpointing and torch.is_grad_enabled())
            x = block(x, size) if keep else checkpoint(block, x, size)
            if visit is not None:
                visit(i, x[:, 1:] if i >= self.local_up_to_layer and self.cls_token is not None else x, size)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normed tokens ``(B, 1 + H * W, C)``, the class token first."""
        return self.norm(self._run(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the patch tokens after the chosen blocks, and the final tokens unless ``intermediates_only``."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        count = len(self.blocks)
        chosen = range(count)[-indices:] if isinstance(indices, int) else indices or range(count)
        take = [i % count for i in chosen]
        found: list[Tensor] = []

        def visit(i: int, tokens: Tensor, size: Size) -> None:
            if i in take:
                y = self.norm(tokens) if norm else tokens
                found.append(y.transpose(1, 2).unflatten(2, size) if output_fmt == "NCHW" else y)

        x = self._run(x, visit, last=max(take) if stop_early else -1)
        return found if intermediates_only else (self.norm(x), found)


class FusedPartitionAttention(PartitionAttentionCl):
    """MaxViT's block or grid attention on `window_attention`: the map is padded where windows do not divide it."""

    def forward(self, x: Tensor) -> Tensor:
        """Mix the map ``(B, H, W, C)`` in windows or over a grid."""
        _, H, W, _ = x.shape
        height, width = self.partition_size
        # Padded behind the norm: padded tokens are keys and values of the bias.
        y = pad_to_windows(self.norm1(x), height, width)
        attn = self.attn
        qkv = attn.qkv(y)
        if attn.head_first:
            q, k, v = qkv.unflatten(-1, (attn.num_heads, -1)).permute(0, 3, 1, 2, 4).chunk(3, dim=-1)
        else:
            q, k, v = (_heads(t, attn.num_heads) for t in qkv.chunk(3, dim=-1))
        bias = None
        if attn.rel_pos is not None:
            bias = attn.rel_pos.get_bias()
            bias = bias[0] if bias.ndim == 4 else bias  # (h, n, n)
        y = window_attention(
            q, k, v, window=(height, width), bias=bias, grid=not self.partition_block, scale=attn.scale
        )
        y = attn.proj_drop(attn.proj(y.permute(0, 2, 3, 1, 4).flatten(3)[:, :H, :W]))
        x = x + self.drop_path1(self.ls1(y))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class FusedSHSA(SHSA):
    """SHViT's single-head attention: on large maps PyTorch's fused one, without the matrix of weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Mix the first channels of the map ``(B, C, H, W)``."""
        B, _, H, W = x.shape
        # Two products win on small maps; where an implementation is asked for, the fused operator is what runs. The
        # first question is the second for what is most common: each costs as much as the softmax of a 7x7 map.
        if x.is_cpu and isinstance(H, int) and H * W <= _PRODUCTS_ON_CPU and get_impl() == "auto":
            return super().forward(x)
        if exporting() or (get_impl() == "auto" and first_wins(PRODUCTS_WIN, H * W, x)):
            return super().forward(x)
        attended, rest = x.split([self.pdim, self.dim - self.pdim], dim=1)
        # Split before transposing: the gradient that then reaches the batch norm is contiguous. On the CPU, torch 2.11
        # computes wrong gradients of its weight for a batch of one whose gradient has a transposed layout.
        qkv = self.qkv(self.pre_norm(attended)).split([self.qk_dim, self.qk_dim, self.pdim], dim=1)
        q, k, v = (t.flatten(2).transpose(1, 2)[:, None] for t in qkv)  # 3 x (B, 1, N, d)
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)[:, 0].transpose(1, 2)
        return self.proj(torch.cat([y.reshape(B, self.pdim, H, W), rest], dim=1))


@dataclass(frozen=True)
class _Fused:
    cls: type[nn.Module]
    operator: str  # empty where the class attends to nothing itself


FUSED: dict[type[nn.Module], _Fused] = {
    GPSA: _Fused(FusedGPSA, "gated_positional_attention"),
    MHSA: _Fused(FusedMHSA, "scaled_dot_product_attention"),
    Block: _Fused(FusedConVitBlock, ""),
    ConVit: _Fused(FusedConVit, ""),
    ChannelAttention: _Fused(FusedChannelAttention, "channel_attention"),
    ChannelAttentionV2: _Fused(FusedChannelAttentionV2, "channel_attention"),
    ChannelBlock: _Fused(FusedChannelBlock, ""),
    ConvPosEnc: _Fused(FusedConvPosEnc, ""),
    SpatialBlock: _Fused(FusedSpatialBlock, "window_attention"),
    PartitionAttentionCl: _Fused(FusedPartitionAttention, "window_attention"),
    SHSA: _Fused(FusedSHSA, "scaled_dot_product_attention"),
}
