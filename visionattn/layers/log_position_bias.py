"""Relative position bias from an MLP over log-spaced coordinates, for any pair of token and pooled token."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionattn.ops._autocast import autocast_dtype

Size = tuple[int, int]

CACHE_BYTES = 8 * 2**20  # a larger result is computed again


class LogPositionBias(nn.Module):
    """Continuous position bias (Swin v2, arXiv:2111.09883; between tokens and pooled tokens: TransNeXt).

    A pooled token stands at the mean position of the tokens that adaptive average pooling gives it. The MLP sees the
    distance ``r = (query - key) / (pretrain_side - 1) * 8`` on each axis as ``sign(r) * log2(|r| + 1) / 3``. It is run
    once for each distance that occurs, and nothing that depends on a size is stored in the state dict.

    While neither training nor recording gradients, the last result is kept as long as the parameters stay the same.

    Args:
        num_heads: Heads.
        pretrain_side: Side of the map that the weights were trained at; at least 2.
        hidden_dim: Width of the MLP.
        bias_size: Size of the map that the biases are made for and then resized bilinearly to the map that comes,
            with the size of its pooled map; None makes them for the map that comes.
    """

    def __init__(
        self, num_heads: int, *, pretrain_side: int, hidden_dim: int = 512, bias_size: tuple[Size, Size] | None = None
    ) -> None:
        super().__init__()
        if pretrain_side < 2:
            raise ValueError(f"pretrain_side must be at least 2 tokens, got {pretrain_side}")
        self.pretrain_side, self.bias_size = pretrain_side, bias_size
        self.fc1 = nn.Linear(2, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, num_heads)
        self._kept: dict[str, tuple[Any, Tensor]] = {}

    def forward(self, size: Size, pooled: Size) -> Tensor:
        """Return the bias of every pair ``(heads, H * W, h * w)`` for a map and its pooled map."""
        return self._keep("bias", (size, pooled), lambda: self._bias(size, pooled))

    def _bias(self, size: Size, pooled: Size) -> Tensor:
        made_for, made_pooled = self.bias_size or (size, pooled)
        y, x = (self._axis(n, p) for n, p in zip(made_for, made_pooled, strict=True))
        table = self._keep("table", (made_for, made_pooled), lambda: self._table(y[0], x[0]))  # (distances, heads)
        index = y[1][:, None, :, None] * x[0].shape[0] + x[1].unsqueeze(1)  # (H, W, h, w)
        bias = table.t().index_select(1, index.flatten())
        bias = bias.view(-1, pooled_tokens(made_for), pooled_tokens(made_pooled))
        if made_pooled != pooled:
            bias = F.interpolate(bias.unflatten(2, made_pooled), pooled, mode="bilinear", align_corners=False).flatten(
                2
            )
        if made_for != size:
            bias = bias.transpose(1, 2).unflatten(2, made_for)
            bias = F.interpolate(bias, size, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
        return bias.contiguous()  # the attention reads it row by row

    def _table(self, y: Tensor, x: Tensor) -> Tensor:
        """The MLP's output for every pair of distances ``(len(y) * len(x), heads)``."""
        rows = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)
        return self.fc2(F.relu(self.fc1(rows), inplace=True))

    def _axis(self, size: int, pooled: int) -> tuple[Tensor, Tensor]:
        """On one axis: the coordinates of all distances that occur, and the number of each pair's ``(size, pooled)``.

        Distances are multiples of a half, of one where pooling cells are equally large: they are counted in halves.
        """
        device = self.fc1.weight.device
        step = 1 if size % pooled else 2
        cell = torch.arange(pooled, device=device)
        keys = cell * size // pooled + ((cell + 1) * size + pooled - 1) // pooled - 1  # first + last token of a cell
        lowest = -((pooled - 1) * size // pooled + size - 1)
        highest = 2 * (size - 1) - ((size + pooled - 1) // pooled - 1)
        index = (2 * torch.arange(size, device=device)[:, None] - keys - lowest) // step
        distances = torch.arange(lowest, highest + 1, step, device=device).to(torch.float32) / 2
        if self.fc1.weight.dtype == torch.float64:
            distances = distances.double()
        r = distances / (self.pretrain_side - 1) * 8
        return (r.sign() * (r.abs() + 1).log2() / 3).to(self.fc1.weight.dtype), index

    # What is kept is dropped by whatever may change the parameters, and never used where it might be traced.

    def _keep(self, name: str, what: Any, compute: Callable[[], Tensor]) -> Tensor:
        parameters = tuple(self.parameters())
        if (
            self.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or any(type(p) is not nn.Parameter or p.is_meta or p.is_inference() for p in parameters)
        ):
            return compute()
        key = (
            what,
            self.bias_size,
            autocast_dtype(parameters[0]),
            [(p.data_ptr(), p._version, p.dtype) for p in parameters],
        )
        if name in self._kept and self._kept[name][0] == key:
            return self._kept[name][1]
        value = compute()
        if value.nbytes <= CACHE_BYTES:
            self._kept[name] = (key, value)
        return value

    def train(self, mode: bool = True) -> "LogPositionBias":
        self._kept.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "LogPositionBias":
        self._kept.clear()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}


def pooled_tokens(size: Size) -> int:
    """Tokens of a map."""
    return size[0] * size[1]
