"""Attention in windows of a map: Swin's shifted squares and CSwin's stripes."""

import torch
from timm.layers import RelPosBias
from torch import Tensor, nn
from torch.nn import functional as F

from visionattn.layers.channels_last import depthwise
from visionattn.layers.padding import lacking, pad_to_windows
from visionattn.ops import Impl
from visionattn.ops._dispatch import open_size
from visionattn.ops.window_attention import window_attention


class WindowAttention(nn.Module):
    """Swin's window attention with a relative position bias. ``(B, H, W, C)`` to the same shape.

    A map that windows do not divide is zero-padded at the bottom and right; padded tokens are keys like any other.

    Args:
        dim: Channels.
        num_heads: Heads; ``dim`` must be a multiple.
        window: Side of a window.
        shift: Tokens by which windows are moved down and right.
        shift_single: Move the windows of a map that is no larger than a window, too, as detection code does and
            classifiers do not.
        impl: Implementation of `visionattn.ops.window_attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        window: int = 7,
        shift: int = 0,
        shift_single: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        if not 0 <= shift < window:
            raise ValueError(f"shift must be in [0, window), got {shift} and {window}")
        self.num_heads, self.window, self.shift, self.shift_single, self.impl = (
            num_heads,
            window,
            shift,
            shift_single,
            impl,
        )
        self.qkv = nn.Linear(dim, 3 * dim)
        self.bias = RelPosBias((window, window), num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        w = self.window
        shift = self.shift if self.shift_single else self._shift(H, W)
        q, k, v = _heads(self.qkv(pad_to_windows(x, w, w)), self.num_heads)
        y = window_attention(q, k, v, window=w, bias=self.bias.get_bias()[0], shift=shift, impl=self.impl)
        return self.proj(y.permute(0, 2, 3, 1, 4).flatten(3)[:, :H, :W])

    def _shift(self, H: int, W: int) -> int:
        """Not on a map of one window; written as a number where an exporter leaves the size open."""
        if open_size(H, W):
            return self.shift * torch.sym_min(1, (torch.sym_min(H, W) - 1) // self.window)
        return self.shift if min(H, W) > self.window else 0


class StripeAttention(nn.Module):
    """CSwin's attention in stripes, with a depthwise convolution of the values in each (LePE).

    ``(B, H, W, C)`` to the same shape. Half of the heads attend in stripes of full height and ``split`` columns, the
    other half in stripes of full width and ``split`` rows. A map that stripes do not divide is padded on both sides,
    behind the projection, by keys and values of zero, as in CSwin's segmentation code.

    Args:
        dim: Channels.
        num_heads: Heads; ``dim`` must be a multiple, and they must be even in number unless ``split`` is None.
        split: Width of a stripe; None makes the map one window of all heads.
        impl: Implementation of `visionattn.ops.window_attention`.
    """

    def __init__(self, dim: int, *, num_heads: int, split: int | None = 7, impl: Impl = "auto") -> None:
        super().__init__()
        branches = 1 if split is None else 2
        if dim % num_heads or num_heads % branches:
            raise ValueError(f"dim must be a multiple of num_heads, which must be even, got {dim} and {num_heads}")
        self.num_heads, self.split, self.impl = num_heads, split, impl
        self.qkv = nn.Linear(dim, 3 * dim)
        self.lepe = nn.ModuleList(depthwise(dim // branches, 3) for _ in range(branches))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(3, (3, len(self.lepe), -1))  # (B, H, W, 3, branches, C / branches)
        if self.split is None:
            return self.proj(self._attend(qkv[..., 0, :], (None, None), 0))
        down = self._attend(qkv[..., 0, :], (None, self.split), 0)
        across = self._attend(qkv[..., 1, :], (self.split, None), 1)
        return self.proj(torch.cat([down, across], dim=-1))

    def _attend(self, qkv: Tensor, sides: tuple[int | None, int | None], branch: int) -> Tensor:
        """Attend in windows of ``(B, H, W, 3, c)``, whose ``sides`` are the map's where None: ``(B, H, W, c)``."""
        _, H, W, _, _ = qkv.shape
        window = (H if sides[0] is None else sides[0], W if sides[1] is None else sides[1])
        more_h, more_w = (0 if s is None else lacking(n, s) for n, s in zip((H, W), sides, strict=True))
        top, left = more_h // 2, more_w // 2
        if more_h or more_w:
            qkv = F.pad(qkv, (0, 0, 0, 0, left, more_w - left, top, more_h - top))
        q, k, v = _heads(qkv.flatten(3), self.num_heads // len(self.lepe))
        y = window_attention(q, k, v, window=window, impl=self.impl).permute(0, 2, 3, 1, 4).flatten(3)
        y = y + self._lepe(qkv[..., 2, :], window, branch)
        return y[:, top : top + H, left : left + W]

    def _lepe(self, v: Tensor, window: tuple[int, int], branch: int) -> Tensor:
        """Convolve ``(B, H, W, c)`` inside each window: no window sees another's values."""
        B, H, W, C = v.shape
        wh, ww = window
        v = v.reshape(B, H // wh, wh, W // ww, ww, C).transpose(2, 3).reshape(-1, wh, ww, C)
        v = self.lepe[branch](v)
        return v.reshape(B, H // wh, W // ww, wh, ww, C).transpose(2, 3).reshape(B, H, W, C)


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    B, H, W, _ = qkv.shape
    q, k, v = qkv.reshape(B, H, W, 3, num_heads, -1).permute(3, 0, 4, 1, 2, 5)  # 3 x (B, h, H, W, d)
    return q, k, v
