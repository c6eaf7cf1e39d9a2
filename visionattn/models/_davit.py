"""timm's DaViT on this library's operators: what `visionattn.fuse` makes of its blocks and their parts."""

import torch
from timm.layers import Mlp
from timm.models.davit import ChannelAttention, ChannelAttentionV2, ChannelBlock, ConvPosEnc, SpatialBlock
from torch import Tensor, nn
from torch.nn import functional as F

from visionattn.layers.inference import add_in_place, overwritable
from visionattn.layers.padding import pad_to_windows
from visionattn.ops import channel_attention, get_impl, window_attention
from visionattn.ops._autocast import autocast_dtype


class FusedConvPosEnc(ConvPosEnc):
    """DaViT's position encoding, ``x + conv(x)``, as one convolution: its kernel's centre is raised by one.

    Compilers get the sum, which they fuse with the norm behind it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Add to the map ``(B, C, H, W)`` a depthwise convolution of it."""
        conv = self.proj
        plain = type(conv) is nn.Conv2d and not (conv._forward_hooks or conv._forward_pre_hooks)
        # In half precision a small weight would drown in the one.
        exact = x.element_size() >= 4 and autocast_dtype(x) is None
        if torch.compiler.is_compiling() or not (plain and exact and isinstance(self.act, nn.Identity)):
            return super().forward(x)
        centre = [side // 2 for side in conv.kernel_size for _ in range(2)]
        weight = conv.weight + F.pad(conv.weight.new_ones(1, 1, 1, 1), centre)
        return F.conv2d(x, weight, conv.bias, padding=conv.padding, groups=conv.groups)


class FusedChannelAttention(ChannelAttention):
    """DaViT's channel attention on `channel_attention`."""

    def forward(self, x: Tensor) -> Tensor:
        """Mix the channels of ``(B, N, C)``."""
        # In DaViT's code k and v are scored and q holds the content.
        content, q, k = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, g, N, d)
        y = channel_attention(q, k, content, scale=self.scale)
        return self.proj(y.transpose(1, 2).flatten(2))


class FusedChannelAttentionV2(ChannelAttentionV2):
    """Florence-2's channel attention on `channel_attention`."""

    def forward(self, x: Tensor) -> Tensor:
        """Mix the channels of ``(B, N, C)``."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.groups, -1)).permute(2, 0, 3, 1, 4)  # 3 x (B, g, N, d)
        scale = x.shape[1] ** -0.5 if self.dynamic_scale else self.head_dim**-0.5
        return self.proj(channel_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2))


class FusedChannelBlock(ChannelBlock):
    """DaViT's channel block, its maps NHWC in memory; inference on the CPU overwrites what it no longer needs."""

    def forward(self, x: Tensor) -> Tensor:
        """Mix the map ``(B, C, H, W)``."""
        x = self.cpe1(x)
        size = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)  # (B, N, C)
        if overwritable(x, self.cpe1, self.norm1):
            add_in_place(x, self._attend, width=3)
        else:
            x = x + self.drop_path1(self._attend(x))
        return _feed_forward(self, self.cpe2(x.transpose(1, 2).unflatten(2, size)))

    def _attend(self, x: Tensor) -> Tensor:
        return self.attn(self.norm1(x))


class FusedSpatialBlock(SpatialBlock):
    """DaViT's window block on `window_attention`: the map is padded only where windows do not divide it."""

    def forward(self, x: Tensor) -> Tensor:
        """Mix the map ``(B, C, H, W)`` in windows."""
        x = self.cpe1(x).permute(0, 2, 3, 1).contiguous()  # (B, H, W, C), mostly without a copy
        if overwritable(x, self.cpe1, self.norm1):  # rows of windows know nothing of each other
            height, width = self.window_size
            whole = x.shape[1] % height == x.shape[2] % width == 0
            add_in_place(x.view(-1, height, *x.shape[2:]) if whole else x, self._attend, width=3)
        else:
            y = self._attend(x)
            x = x + (y if self.drop_path1 is None else self.drop_path1(y))
        return _feed_forward(self, self.cpe2(x.permute(0, 3, 1, 2)))

    def _attend(self, x: Tensor) -> Tensor:
        _, H, W, _ = x.shape
        height, width = self.window_size
        # Padded behind the norm: padded tokens are keys and values of the bias.
        y = pad_to_windows(self.norm1(x), height, width)
        if y.device.type != "cpu" or get_impl() != "auto":  # kernels read windows where they lie
            return self._mix(y)[:, :H, :W]
        # Copies are made of the tokens here, not of the three tensors that are made of them.
        y = y.unflatten(2, (-1, width)).unflatten(1, (-1, height)).transpose(2, 3)  # (B, rows, columns, h, w, C)
        return self._mix(y.flatten(0, 2)).view(y.shape).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :H, :W]

    def _mix(self, x: Tensor) -> Tensor:
        attn = self.attn
        qkv = attn.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, H, W, 3, heads, d)
        q, k, v = qkv.permute(3, 0, 4, 1, 2, 5)
        y = window_attention(q, k, v, window=self.window_size, scale=attn.scale)
        return attn.proj(y.permute(0, 2, 3, 1, 4).flatten(3))


def _feed_forward(block: ChannelBlock | SpatialBlock, x: Tensor) -> Tensor:
    """Run the second half of a block, token by token, on the map ``(B, C, H, W)``."""
    mlp = block.mlp
    if mlp is None:
        return x
    x = x.permute(0, 2, 3, 1).contiguous()  # (B, H, W, C)
    if overwritable(x, block.cpe2, block.norm2, mlp, mlp.fc1, mlp.act):
        add_in_place(x.flatten(0, 2), lambda tokens: _mlp(mlp, block.norm2(tokens)), width=4)
    else:
        x = x + block.drop_path2(mlp(block.norm2(x)))
    return x.permute(0, 3, 1, 2)


def _mlp(mlp: Mlp, x: Tensor) -> Tensor:
    """Run an MLP for inference; GELU overwrites the hidden activations."""
    hidden = mlp.fc1(x)
    in_place = type(mlp.act) is nn.GELU
    hidden = torch.ops.aten.gelu_(hidden, approximate=mlp.act.approximate) if in_place else mlp.act(hidden)
    return mlp.fc2(mlp.norm(hidden))
