"""What the attention of a model attends to: exact weights of every operator, for chosen queries.

Every operator is linear in its values once queries and keys are given, so the weights of a query are the derivative of
its output by the values. A model runs once, the inputs of each operator are kept, and that derivative is taken by the
operator itself: no formula of a family's attention is written a second time, and no matrix is held that was not asked
for.
"""

import importlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from visionattn.analysis._geometry import Grid, Seen, Size, map_grid, pooled_bins, shrunk, token_grid
from visionattn.fuse import FUSED
from visionattn.layers.attention.window import StripeAttention
from visionattn.ops._dispatch import choose
from visionattn.ops._intercept import intercepted

SOFTMAX = "scaled_dot_product_attention"
CHUNK = 32  # queries whose weights are derived at once


class NoAttentionError(ValueError):
    """A model has no attention that can be shown; the message says why and what to do."""


@dataclass(frozen=True)
class Maps:
    """Weights of queries on the places of a map.

    Attributes:
        weights: ``(heads, queries, H, W)``.
        prefix: Weights on class and other tokens outside the map, summed: ``(heads, queries)``.
        padding: Weights on tokens that stand for no part of the image, summed: ``(heads, queries)``.
    """

    weights: Tensor
    prefix: Tensor
    padding: Tensor


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """One call of an attention operator, for one image.

    Attributes:
        name: The module that called, and ``/2`` for its second call.
        operator: The operator's name, as in `visionattn.ops`, or ``"scaled_dot_product_attention"``.
        kind: The same for people, with its sizes: ``"window 7 x 7"``.
        heads: Heads; groups of channels for channel attention.
        grid: Places of the query tokens; None if unknown.
        pooled: ``(H, W)`` of pooled keys, if there are any.
        gates: A number a head, if there are gates: the share of attention by position (ConViT), or the mean of the
            output gate (gated ViTs).
        args: What the operator's implementations were called with.
    """

    name: str
    operator: str
    kind: str
    heads: int
    grid: Grid | None
    pooled: Size | None
    args: tuple[Any, ...]
    gates: Tensor | None = None

    @property
    def map_size(self) -> Size:
        """``(H, W)`` of the maps that `maps` returns."""
        return self._grid().valid

    @property
    def same_for_all(self) -> bool:
        """Whether all queries have the same weights, as in the linear form of infinite attention."""
        return self.operator == "infinite_attention" and "linear" in self.args

    @property
    def regions(self) -> tuple[Tensor, Size] | None:
        """Routed regions ``(P, topk)`` of every region, by falling affinity, and the grid of regions (BiFormer)."""
        return (self.args[3][0], self.args[4]) if self.operator == "routed_attention" else None

    def output(self) -> Tensor:
        """What the operator returned: ``(heads, queries, channels)``; one query if all are the same."""
        with torch.no_grad():
            return self._run(self.args).flatten(2, -2)[0]

    def values(self) -> Tensor:
        """The values that weights apply to: ``(heads, keys, channels)``, those of pooled keys last."""
        return torch.cat([self.args[i].flatten(2, -2)[0] for i in self._values], dim=1)

    def rows(self, queries: Sequence[int] | Tensor) -> Tensor:
        """Return the weights of queries on all keys, exactly: ``weights @ values`` is the operator's output.

        They sum to one where the operator's do: not behind clipped softmax, in infinite attention, with TransNeXt's
        learnable tokens or with MALA's rotation. Linear attention has negative ones.

        Args:
            queries: Numbers of tokens as the operator counts them: prefix tokens first, then the map row by row.

        Returns:
            ``(heads, len(queries), keys)`` in the dtype of the model; the keys in the order of `values`.

        Raises:
            ValueError: a number is out of range, or this is channel attention, which has no weights of tokens.
        """
        if self.operator == "channel_attention":
            raise ValueError(f"{self.name} attends among channels, not tokens: see channel_map()")
        index, count = torch.as_tensor(queries).flatten().cpu(), self.args[0].shape[2:-1].numel()
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < count:
            raise ValueError(f"{self.name}: queries must be in [0, {count}), got {int(index.min())} to {index.max()}")
        return torch.cat([self._rows(part) for part in index.split(CHUNK)], dim=1)

    def maps(self, queries: Sequence[int] | Tensor) -> Maps:
        """Return the weights of queries as maps over the image; those of pooled keys are spread over what they pool.

        Args:
            queries: As for `rows`; ``grid.token(row, column)`` and ``grid.numbers()`` give them for places.

        Raises:
            ValueError: as for `rows`, or it is not known how the tokens lie on the image.
        """
        grid, rows = self._grid(), self.rows(queries)
        total = rows.sum(dim=-1)
        maps, prefix = rows.new_zeros(*rows.shape[:2], grid.valid[0] * grid.valid[1]), torch.zeros_like(total)
        keys = self.args[1].shape[2:-1].numel()
        if keys == grid.tokens:
            prefix = rows[..., : grid.prefix].sum(dim=-1)
            maps = rows[..., grid.numbers().to(rows.device)]
        if self.pooled is not None:
            last = self.pooled[0] * self.pooled[1]
            maps = maps + rows[..., -last:] @ pooled_bins(grid.valid, self.pooled).to(rows)
        weights = maps.unflatten(-1, grid.valid)
        return Maps(weights, prefix, total - prefix - maps.sum(dim=-1))

    def channel_map(self) -> Tensor:
        """Return the weights of channels on channels, exactly: ``(groups, d, d)``, rows of the output's channels.

        Raises:
            ValueError: this is no channel attention.
        """
        if self.operator != "channel_attention":
            raise ValueError(f"{self.name} attends among tokens: see rows() and maps()")
        tokens, d = self.args[2].shape[2:]
        columns = []
        for first in range(0, d, tokens):
            values = torch.zeros_like(self.args[2])  # token n holds the unit vector of channel first + n
            part = range(first, min(first + tokens, d))
            values[:, :, torch.arange(len(part)), torch.tensor(part)] = 1
            args = (*self.args[:2], values, *self.args[3:])
            with torch.no_grad():
                columns.append(self._run(args)[0, :, : len(part)].transpose(1, 2))
        return torch.cat(columns, dim=-1)

    @property
    def _values(self) -> tuple[int, ...]:
        return (2, 4) if self.operator == "aggregated_attention" else (2,)

    def _grid(self) -> Grid:
        if self.grid is None:
            raise ValueError(f"{self.name}: nothing says how its {self.args[0].shape[2:-1].numel()} tokens lie")
        return self.grid

    def _run(self, args: Sequence[Any]) -> Tensor:
        if self.operator == SOFTMAX:
            q, k, v, mask, causal, scale = args
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
        known = importlib.import_module(f"visionattn.ops.{self.operator}").IMPLS
        return choose(self.operator, "auto", known, *args).forward(*args)

    def _rows(self, queries: Tensor) -> Tensor:
        args, n = list(self.args), len(queries)
        with torch.inference_mode(False), torch.enable_grad():
            for i in self._values:  # a column of the values for each query
                args[i] = args[i].new_zeros(*args[i].shape[:-1], n).requires_grad_()
            out = self._run(args)
            picked = torch.zeros_like(out)
            at = torch.zeros_like(queries) if self.same_for_all else queries
            picked.flatten(2, -2)[:, :, at, torch.arange(n)] = 1
            grads = torch.autograd.grad(out, [args[i] for i in self._values], picked)
        return torch.cat([g.flatten(2, -2)[0].transpose(1, 2) for g in grads], dim=-1)


@dataclass(frozen=True)
class Recording:
    """A forward pass with the attention in it.

    Attributes:
        output: What the model returned.
        layers: Calls of attention operators, in order.
        image_size: ``(H, W)`` of the image.
        unseen: Names of layers whose maps were cut into windows before the operator, so that places are not known.
    """

    output: Any
    layers: list[AttentionLayer]
    image_size: Size
    unseen: list[str]

    def layer(self, name: str) -> AttentionLayer:
        """Return a layer by its name.

        Raises:
            ValueError: there is none of that name; the message lists them.
        """
        found = next((layer for layer in self.layers if layer.name == name), None)
        if found is None:
            raise ValueError(
                f"no attention layer is named {name!r}; there are {', '.join(x.name for x in self.layers)}"
            )
        return found


def record_attention(model: nn.Module, x: Tensor) -> Recording:
    """Run a model on one image and keep what every attention operator in it was given.

    Sees every operator of `visionattn.ops` and PyTorch's scaled dot-product attention: all models of this library,
    timm's MaxViT, DaViT, ConViT and SHViT after `visionattn.fuse`, and timm's models of plain softmax attention (ViT,
    DeiT, PVTv2 and others; modules with ``fused_attn`` are made to use it). Not seen is attention that a model writes
    out itself, such as that of timm's Swin V2.

    Args:
        model: In eval mode; it is not changed.
        x: One image ``(1, C, H, W)``, normalised as the model expects.

    Raises:
        ValueError: ``x`` is not one image, or the model is in training mode.
        NoAttentionError: no attention ran that could be seen, or all of it in windows that were cut before.
    """
    if x.ndim != 4 or x.shape[0] != 1:
        raise ValueError(f"one image (1, C, H, W) expected, got {tuple(x.shape)}")
    if model.training:
        raise ValueError("the model is in training mode, in which it drops what it attends to: call model.eval()")
    recorder = _Recorder(model, (x.shape[2], x.shape[3]))
    with ExitStack() as stack:
        stack.enter_context(recorder.watching())
        stack.enter_context(intercepted(recorder.wrap))
        stack.enter_context(_PlainAttention(recorder))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        output = model(x)
    layers = [layer for layer in recorder.layers if layer.args[0].shape[0] == 1]
    if not layers:
        raise NoAttentionError(_why_none(model, recorder))
    unseen = [layer.name for layer in recorder.layers if layer.args[0].shape[0] != 1]
    return Recording(output, layers, (x.shape[2], x.shape[3]), unseen)


def _why_none(model: nn.Module, recorder: "_Recorder") -> str:
    name = type(model).__name__
    if recorder.layers:
        return f"{name} cuts its maps into windows before it attends, so where its tokens lie is not known"
    if any(type(m) in FUSED for m in model.modules()):
        return (
            f"no attention found in {name}: call visionattn.fuse(model) first, which lets timm's class be looked into"
        )
    return f"no attention found in {name}: it has none, or writes it out without an operator that can be seen"


@dataclass
class _Recorder:
    """Collects calls, and knows which modules are running."""

    model: nn.Module
    image: Size
    layers: list[AttentionLayer] = field(default_factory=list)
    running: list[Seen] = field(default_factory=list)
    inside: bool = False  # an operator that is recorded: what it calls is a part of it

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow which modules run, and let those that can use the fused operator do so."""
        hooks, unfused = [], [m for m in self.model.modules() if getattr(m, "fused_attn", None) is False]
        for name, module in self.model.named_modules():

            def enter(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                self.running.append(Seen(name, module, (*args, *kwargs.values())))

            hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
        try:
            for module in unfused:
                module.fused_attn = True  # type: ignore[assignment]
            yield
        finally:
            for module in unfused:
                module.fused_attn = False  # type: ignore[assignment]
            for hook in hooks:
                hook.remove()

    def _leave(self) -> None:
        self.running.pop()

    def wrap(self, op: str, implementation: ModuleType) -> "_Recorded":
        """Stand in for an implementation of an operator."""
        return _Recorded(self, op, implementation)

    def add(self, op: str, args: tuple[Any, ...]) -> None:
        """Keep one call."""
        args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
        name = self.running[-1].name if self.running else ""
        if op == "sigmoid_gate":
            self._gate(name, args[1], args[2])
            return
        q, k = args[:2]
        grid: Grid | None
        pooled: Size | None = None
        if q.ndim == 5:
            centred = bool(self.running) and isinstance(self.running[-1].module, StripeAttention)
            grid = map_grid((q.shape[2], q.shape[3]), self.running, centred)
            if op == "aggregated_attention":
                pooled = self.running[-1].module.pooled_size(grid.size) if self.running else None
        else:
            prefixes = dict.fromkeys((int(getattr(self.model, "num_prefix_tokens", 0)), 0, 1))
            grid = token_grid(q.shape[2], self.running, self.image, tuple(prefixes))
            if grid is not None and k.shape[2] != q.shape[2]:
                pooled = shrunk(grid.valid, k.shape[2])
                grid = grid if pooled is not None else None
        gates = args[4].float().cpu() if op == "gated_positional_attention" else None
        kind = _kind(op, args, grid, pooled)
        earlier = [x for x in self.layers if x.name.partition("/")[0] == name]
        label = f"{name}/{len(earlier) + 1}" if earlier else name
        self.layers.append(AttentionLayer(label, op, kind, q.shape[1], grid, pooled, args, gates))

    def _gate(self, name: str, logits: Tensor, scale: float) -> None:
        layer = self.layers[-1] if self.layers else None
        if layer is not None and layer.name.partition("/")[0] == name:
            gates = (logits.float().sigmoid() * scale).mean(dim=(0, 1, 3)).cpu()  # (1 or B, 1 or N, heads, 1 or d)
            self.layers[-1] = AttentionLayer(**{**vars(layer), "gates": gates.expand(layer.heads)})


@dataclass(frozen=True)
class _Recorded:
    """An implementation whose calls are kept."""

    recorder: _Recorder
    op: str
    implementation: Any

    def why_not(self, *args: Any) -> str | None:
        return self.implementation.why_not(*args)

    def forward(self, *args: Any) -> Tensor:
        self.recorder.add(self.op, args)
        self.recorder.inside = True
        try:
            return self.implementation.forward(*args)
        finally:
            self.recorder.inside = False


class _PlainAttention(TorchFunctionMode):
    """Sees calls of PyTorch's scaled dot-product attention that no operator made."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and not self.recorder.inside:
            q, k, v, mask, causal, scale = _softmax_arguments(*args, **kwargs)
            if q.ndim == 4:
                repeats = q.shape[1] // k.shape[1]  # of keys that groups of heads share
                k, v = (t.repeat_interleave(repeats, dim=1) if repeats > 1 else t for t in (k, v))
                self.recorder.add(SOFTMAX, (q, k, v, mask, causal, scale))
        return func(*args, **kwargs)


def _softmax_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool, float | None]:
    return query, key, value, attn_mask, is_causal, scale


def _kind(op: str, args: tuple[Any, ...], grid: Grid | None, pooled: Size | None) -> str:
    """Describe a call in a few words."""
    a = dict(zip(inspect.signature(_reference(op)).parameters, args, strict=False)) if op != SOFTMAX else {}
    if op == "agent_attention":
        return f"through {a['agents'].shape[2]} agents"
    if op == "aggregated_attention":
        side = round(a["bias_local"].shape[-1] ** 0.5)
        return f"window {side} x {side} and {_by(pooled)} pooled keys" if pooled else f"window {side} x {side}, pooled"
    if op == "channel_attention":
        return f"channels, groups of {a['q'].shape[-1]}"
    if op == "infinite_attention":
        return "infinite, linear: centrality" if a["form"] == "linear" else "infinite, pure"
    if op == "linear_attention":
        return f"linear, {a['normalization'].replace('_', ' ')}"
    if op == "neighborhood_attention":
        spread = "" if max(a["dilation"]) == 1 else f", dilation {max(a['dilation'])}"
        return f"neighbourhood {_by(a['kernel_size'])}{spread}"
    if op == "routed_attention":
        return f"routed to {a['index'].shape[2]} of {a['index'].shape[1]} regions"
    if op == "window_attention":
        shift = f", shifted by {max(a['shift'])}" if any(a["shift"]) else ""
        return f"{'grid' if a['grid'] else 'window'} {_by(a['window'])}{shift}"
    names = {"clipped_softmax_attention": "clipped softmax", "gated_positional_attention": "gated positional"}
    return names.get(op, "softmax") + (f" on {_by(pooled)} pooled keys" if pooled else "")


def _reference(op: str) -> Any:
    return importlib.import_module(f"visionattn.ops.{op}.reference").forward


def _by(size: Sequence[int] | None) -> str:
    return "" if size is None else " x ".join(map(str, size))
