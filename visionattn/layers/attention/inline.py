"""InLine attention: injective linear attention and a local residual whose kernels the input makes."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionattn.layers.channels_last import depthwise
from visionattn.ops import Impl, linear_attention
from visionattn.ops._dispatch import exporting

Size = tuple[int, int]


class GroupedLinear(nn.Module):
    """A linear layer of ``groups`` blocks on the diagonal: ``(B, C)`` to ``(B, out)``.

    Args:
        dim: Channels of the input; a multiple of ``groups``.
        out_dim: Channels of the output; a multiple of ``groups``.
        groups: Blocks.
    """

    def __init__(self, dim: int, out_dim: int, *, groups: int) -> None:
        super().__init__()
        conv = nn.Conv1d(dim, out_dim, 1, groups=groups)  # for its initial values
        self.weight = nn.Parameter(conv.weight.detach().unflatten(0, (groups, -1))[..., 0])  # (groups, out / g, C / g)
        self.bias = nn.Parameter(conv.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        groups = self.weight.shape[0]
        x = x.unflatten(1, (groups, -1)).unsqueeze(-1)  # (B, groups, C / g, 1)
        return (self.weight @ x).flatten(1) + self.bias


class DynamicDepthwise(nn.Module):
    """Depthwise 3 x 3 convolution of a map by kernels made from its context, others for each item of the batch.

    Args:
        dim: Channels.
        groups: Blocks of the two linear layers between the context and the kernels.
    """

    def __init__(self, dim: int, *, groups: int) -> None:
        super().__init__()
        self.fc1 = GroupedLinear(dim, dim, groups=groups)
        self.act = nn.GELU()
        self.fc2 = GroupedLinear(dim, 9 * dim, groups=groups)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Convolve ``x (B, H, W, C)`` by the kernels of ``context (B, C)``."""
        kernels = self.fc2(self.act(self.fc1(context))).unflatten(1, (-1, 3, 3))  # (B, C, 3, 3)
        return _shifted(x, kernels) if exporting() else _grouped(x, kernels)


def _grouped(x: Tensor, kernels: Tensor) -> Tensor:
    """One convolution whose groups are the channels of all items: fast, but its groups are not known to exporters."""
    B, H, W, C = x.shape
    x = x.permute(0, 3, 1, 2)
    if B != 1:  # a single item stays in its layout
        x = x.reshape(1, B * C, H, W)
    y = F.conv2d(x, kernels.reshape(B * C, 1, 3, 3), padding=1, groups=B * C)
    return y.view(B, C, H, W).permute(0, 2, 3, 1)


def _shifted(x: Tensor, kernels: Tensor) -> Tensor:
    """Nine shifted products: for any batch."""
    _, H, W, _ = x.shape
    kernels = kernels.permute(2, 3, 0, 1)[:, :, :, None, None]  # (3, 3, B, 1, 1, C)
    x = F.pad(x, (0, 0, 1, 1, 1, 1))
    taps = [x[:, i : i + H, j : j + W] * kernels[i, j] for i in range(3) for j in range(3)]
    return torch.stack(taps).sum(dim=0)


class InLineAttention(nn.Module):
    """Injective linear attention plus a depthwise convolution of the values by kernels that the input makes.

    Takes a map ``(B, H, W, C)``, or with ``size`` tokens ``(B, P + H * W, C)``, and returns the same shape.

    Args:
        dim: Channels.
        num_heads: Heads; ``dim`` must be a multiple.
        prefix_tokens: ``P``; they take part in the attention and in the kernels' context, and are not convolved.
        context: What the kernels are made from, in the mean over tokens: the attention's ``"input"``, or the
            ``"block"``'s, before its norm, which is then an argument of the call.
        lepe: Add a depthwise convolution of the values by learned kernels, too.
        impl: Implementation of `visionattn.ops.linear_attention`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        prefix_tokens: int = 0,
        context: Literal["input", "block"] = "input",
        lepe: bool = False,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads, self.prefix_tokens, self.impl = num_heads, prefix_tokens, impl
        self.reads_input = context == "block"
        self.qkv = nn.Linear(dim, 3 * dim)
        self.residual = DynamicDepthwise(dim, groups=num_heads)
        self.lepe = depthwise(dim, 3) if lepe else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: Size | None = None, *, context: Tensor | None = None) -> Tensor:
        shape, (H, W) = x.shape, x.shape[1:3] if size is None else size
        B, C, P = shape[0], shape[-1], self.prefix_tokens
        q, k, v = self.qkv(x).view(B, -1, 3 * C).chunk(3, dim=-1)  # 3 x (B, P + H * W, C)
        values = (v[:, P:] if P else v).unflatten(1, (H, W))
        local = self.residual(values, (x if context is None else context).view(B, -1, C).mean(dim=1))
        if self.lepe is not None:
            local = local + self.lepe(values)
        local = local.flatten(1, 2)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # 3 x (B, h, N, d)
        y = linear_attention(q, k, v, normalization="injective", impl=self.impl).transpose(1, 2).flatten(2)
        return self.proj(y + (F.pad(local, (0, 0, P, 0)) if P else local)).view(shape)
