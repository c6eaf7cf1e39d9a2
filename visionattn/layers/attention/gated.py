"""Attention with output gates and clipped softmax, which let a head leave its tokens unchanged."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionattn.ops import Impl, clipped_softmax_attention, sigmoid_gate

Gate = Literal[
    "unconditional",
    "linear",
    "mlp",
    "mlp2",
    "all_linear",
    "per_head",
    "per_head_mlp",
    "per_head_mlp2",
    "per_head_all_linear",
    "headwise",
    "elementwise",
]
GATES: tuple[str, ...] = get_args(Gate)


class HeadLinear(nn.Module):
    """A linear layer of its own for every head: ``(B, N, heads, in)`` to ``(B, N, heads, out)``."""

    def __init__(self, heads: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(heads, out_features))
        bound = in_features**-0.5  # as nn.Linear
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bnhi,hoi->bnho", x, self.weight) + self.bias


class UnconditionalGate(nn.Module):
    """One learned logit a head, whatever the input."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(num_heads))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(1, 1, heads, 1)``."""
        return self.logit.view(1, 1, -1, 1)


class SliceGate(nn.Module):
    """Logits that each head predicts from its own slice of the channels.

    Args:
        dim: Channels.
        num_heads: Heads.
        hidden: Width of a hidden layer; none if 0.
        init: The gate's value to start from, where there is no hidden layer.
        weight_std: Standard deviation of the weights; a linear layer's usual range if None.
    """

    def __init__(self, dim: int, num_heads: int, *, hidden: int, init: float, weight_std: float | None) -> None:
        super().__init__()
        head_dim = dim // num_heads
        self.num_heads = num_heads
        self.fc1 = HeadLinear(num_heads, head_dim, hidden) if hidden else None
        self.fc2 = HeadLinear(num_heads, hidden or head_dim, 1)
        if weight_std is not None:
            nn.init.normal_(self.fc2.weight, std=weight_std)
        if not hidden:
            nn.init.constant_(self.fc2.bias, math.log(init / (1 - init)))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, N, heads, 1)`` for tokens ``(B, N, C)``."""
        x = x.view(*x.shape[:2], self.num_heads, -1)
        if self.fc1 is not None:
            x = self.fc1(x).relu()
        return self.fc2(x)


class FullGate(nn.Module):
    """Logits predicted from all channels: one a head, or one a channel of each head."""

    def __init__(self, dim: int, num_heads: int, *, elementwise: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fc = nn.Linear(dim, dim if elementwise else num_heads)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(B, N, heads, 1 or head_dim)`` for tokens ``(B, N, C)``."""
        return self.fc(x).view(*x.shape[:2], self.num_heads, -1)


def predictor(gate: str, dim: int, num_heads: int, *, init: float, fine_tuning: bool) -> nn.Module:
    """Return the module that predicts the logits of a gate named in `GATES`."""
    gate = gate.removeprefix("per_head").removeprefix("_") or "linear"
    if gate == "unconditional":
        return UnconditionalGate(num_heads)
    if gate in ("all_linear", "headwise", "elementwise"):
        return FullGate(dim, num_heads, elementwise=gate == "elementwise")
    head_dim = dim // num_heads
    hidden = {"linear": 0, "mlp": head_dim // 4, "mlp2": head_dim}[gate]
    return SliceGate(dim, num_heads, hidden=hidden, init=init, weight_std=0.001 if fine_tuning else None)


class GatedAttention(nn.Module):
    """Self-attention of tokens ``(B, N, C)`` with clipped softmax, an output gate, both, or neither.

    The gate is a sigmoid of logits that are predicted from the layer's input; it multiplies what a head gathered,
    before the output projection. Kinds of Bondarenko et al. (arXiv:2306.12929):

    - ``"linear"``, ``"mlp"``, ``"mlp2"``: one gate a token and head, from the head's own slice of the channels, by a
      linear layer or through a hidden one of a quarter of the head's width, or of all of it;
    - ``"all_linear"``: the same from all channels, by a linear layer;
    - ``"per_head"``: the logits of ``"linear"``, averaged over the tokens; ``"per_head_mlp"``, ``"per_head_mlp2"`` and
      ``"per_head_all_linear"`` those of the others;
    - ``"unconditional"``: a learned number a head.

    And of Qiu et al. (arXiv:2505.06708): ``"headwise"``, one a token and head from all channels, and
    ``"elementwise"``, one a token, head and channel.

    Args:
        dim: Channels.
        num_heads: Heads; ``dim`` must be a multiple.
        gate: A kind above, or None.
        gate_init: The gate's value at the start, where it has a bias to set (``"linear"`` and ``"per_head"``).
        fine_tuning: Divide the gate by ``gate_init`` and start its weights near zero, so that the layer of a trained
            model without gates starts near what it was.
        clip: ``(gamma, zeta)`` of `visionattn.ops.clipped_softmax_attention`; plain softmax if None.
        impl: Implementation of the operators.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        gate: Gate | None = None,
        gate_init: float = 0.25,
        fine_tuning: bool = False,
        clip: tuple[float, float] | None = None,
        impl: Impl = "auto",
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        if gate is not None and gate not in GATES:
            raise ValueError(f"gate must be None or one of {', '.join(GATES)}; got {gate!r}")
        if not 0 < gate_init < 1:
            raise ValueError(f"gate_init must be between 0 and 1, got {gate_init}")
        if clip is not None and not clip[0] <= 0 < 1 <= clip[1]:
            raise ValueError(f"clip is (gamma, zeta) with gamma <= 0 and zeta >= 1, got {tuple(clip)}")
        self.num_heads, self.clip, self.impl = num_heads, clip, impl
        self.average_gate = gate is not None and gate.startswith("per_head")
        self.gate_scale = 1 / gate_init if fine_tuning else 1.0
        self.qkv = nn.Linear(dim, 3 * dim)
        self.gate: nn.Module | None = None
        if gate is not None:
            self.gate = predictor(gate, dim, num_heads, init=gate_init, fine_tuning=fine_tuning)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Attend; ``size``, which hosts of tokens hand to every mixer, has no bearing."""
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        if self.clip is None:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            gamma, zeta = self.clip
            y = clipped_softmax_attention(q, k, v, gamma=gamma, zeta=zeta, impl=self.impl)
        y = y.transpose(1, 2)  # (B, N, h, d)
        if self.gate is not None:
            logits = self.gate(x)
            if self.average_gate:
                logits = logits.mean(dim=1, keepdim=True)
            y = sigmoid_gate(y, logits, scale=self.gate_scale, impl=self.impl)
        return self.proj(y.reshape(B, N, C))
