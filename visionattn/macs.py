"""Multiply-adds of models, counted on the meta device: no memory, no arithmetic, any input size.

What is counted is the mathematics, as the papers count it: convolutions, linear layers and matrix products through
PyTorch's own counter, and each operator of `visionattn.ops` by a formula of its shapes, whichever implementation would
run. Norms, activations, softmax, pooling and resizing count nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from visionattn.ops._intercept import intercepted

Size = tuple[int, int]


@dataclass(frozen=True)
class Cost:
    """What a model holds and what one image costs.

    Attributes:
        params: Parameters; statistics of batch norms are none.
        macs: Multiply-adds.
        by_kind: Those of ``"convolution"``, of ``"matrix product"`` (linear layers among them) and of operators, by
            name.
    """

    params: int
    macs: int
    by_kind: dict[str, int]


def cost(model: nn.Module, run: Callable[[], object]) -> Cost:
    """Count the parameters of a model on the meta device, and what ``run`` costs.

    Args:
        model: A model whose parameters are on the meta device.
        run: Runs what is to be counted of it, for a batch of one.

    Raises:
        ValueError: the model is not on the meta device.
    """
    real = next((name for name, p in model.named_parameters() if not p.is_meta), None)
    if real is not None:
        raise ValueError(f"models are counted on the meta device: {real} is elsewhere; create them with device='meta'")
    by_kind: dict[str, int] = {}

    def add(kind: str, macs: int) -> None:
        by_kind[kind] = by_kind.get(kind, 0) + macs

    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.torchvision.deform_conv2d: _deformable})
    with torch.no_grad(), counter, intercepted(lambda op, _: _Formula(op, add)):
        run()
    for op, flops in counter.get_flop_counts().get("Global", {}).items():
        add("convolution" if "conv" in str(op) else "matrix product", flops // 2)
    return Cost(sum(p.numel() for p in model.parameters()), sum(by_kind.values()), by_kind)


class _Formula:
    """Stands in for an implementation: reports what the operator costs, and returns its result's shape."""

    def __init__(self, op: str, add: Callable[[str, int], None]) -> None:
        self.op, self.add = op, add

    def why_not(self, *args: Any) -> str | None:
        return None

    def forward(self, *args: Any) -> Tensor:
        macs = MACS[self.op](*args)
        if macs:
            self.add(self.op, macs)
        if self.op == "sigmoid_gate":
            return torch.empty_like(args[0])
        q, _, v = args[:3]
        tokens = (*q.shape[:2], 1) if "linear" in args and self.op == "infinite_attention" else q.shape[:-1]
        return v.new_empty((*tokens, v.shape[-1]))


def _queries(q: Tensor, v: Tensor) -> int:
    """Multiply-adds if every query sees one key: a product with the key and one with the value."""
    return q.numel() + q.numel() // q.shape[-1] * v.shape[-1]


def _agent(q: Tensor, k: Tensor, v: Tensor, agents: Tensor, *_: Any) -> int:
    return 2 * _queries(q, v) * agents.shape[2]  # agents see all tokens, and all tokens the agents


def _aggregated(q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, bias_local: Tensor, *_: Any) -> int:
    return _queries(q, v) * (bias_local.shape[-1] + k_pool.shape[2])


def _channel(q: Tensor, k: Tensor, v: Tensor, scale: float) -> int:
    return 2 * q.numel() * q.shape[-1]


def _full(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    return _queries(q, v) * k.shape[2]


def _gated_positional(q: Tensor, k: Tensor, v: Tensor, position: Tensor, *_: Any) -> int:
    N = q.shape[2] * q.shape[3]
    return _queries(q, v) * N + position.numel() * N * N  # positional logits are the same for all images


def _infinite(q: Tensor, k: Tensor, v: Tensor, rho: Tensor, form: str, *_: Any) -> int:
    if form == "pure":
        return _full(q, k, v)
    return q.numel() + k.numel() + v.numel()  # the mean query, its scores, the weighted sum


def _linear(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> int:
    return (q.numel() + k.numel()) * v.shape[-1] + q.numel()  # read the state, make it, normalise


def _neighborhood(q: Tensor, k: Tensor, v: Tensor, bias: Any, kernel_size: Size, *_: Any) -> int:
    return _queries(q, v) * kernel_size[0] * kernel_size[1]


def _routed(q: Tensor, k: Tensor, v: Tensor, index: Tensor, grid: Size, scale: float) -> int:
    tokens = q.shape[2] * q.shape[3] // (grid[0] * grid[1])  # of a region
    return _queries(q, v) * index.shape[2] * tokens


def _sigmoid_gate(y: Tensor, logits: Tensor, scale: float) -> int:
    return 0  # one product an element, as an activation


def _window(q: Tensor, k: Tensor, v: Tensor, window: Size, *_: Any) -> int:
    return _queries(q, v) * window[0] * window[1]


# Multiply-adds of every operator, of the arguments that its implementations take.
MACS: dict[str, Callable[..., int]] = {
    "agent_attention": _agent,
    "aggregated_attention": _aggregated,
    "channel_attention": _channel,
    "clipped_softmax_attention": _full,
    "gated_positional_attention": _gated_positional,
    "infinite_attention": _infinite,
    "linear_attention": _linear,
    "neighborhood_attention": _neighborhood,
    "routed_attention": _routed,
    "sigmoid_gate": _sigmoid_gate,
    "window_attention": _window,
}


def _deformable(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Flops of a deformable convolution: those of a plain one; reading between pixels is not counted."""
    return 2 * weight.numel() * out_shape[0] * out_shape[2] * out_shape[3]
