"""``convert``: swap the softmax attention inside an existing model for another mixer of the library."""

import fnmatch
import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from timm.layers import Attention
from timm.models.pvt_v2 import Attention as PvtAttention
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer import WindowAttention as SwinAttention
from torch import Tensor, nn

from visionattn.layers.attention.agent import AgentAttention
from visionattn.layers.attention.gated import GatedAttention
from visionattn.layers.attention.infinite import InfiniteAttention
from visionattn.layers.attention.softmax import SoftmaxAttention
from visionattn.layers.attention.token_linear import TokenLinearAttention

_logger = logging.getLogger(__name__)

Mixer = Literal["pure_infsa", "linear_infsa", "agent", "injective", "magnitude_aware", "gated", "clipped"]
MIXERS: tuple[str, ...] = get_args(Mixer)
Size = tuple[int, int]


@dataclass
class ConvertReport:
    """What `convert` did to a model.

    Attributes:
        replaced: By the module's name: what it was and is, and what was lost on the way.
        refused: By the module's name: why it could not be replaced.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"replaced {len(self.replaced)} attention modules, refused {len(self.refused)}"]
        lines += [f"  {name}: {what}" for name, what in self.replaced.items()]
        lines += [f"  {name}: refused, {why}" for name, why in self.refused.items()]
        return "\n".join(lines)


class Converted(nn.Module):
    """A mixer of this library behind the signature of the attention that it replaces.

    Args:
        mixer: Called with tokens ``(B, N, C)`` and the size of their map.
        size: Map that the tokens stand for, where the caller does not say.
        prefix_tokens: Tokens before the map.
        returns_weights: Return a pair, as `torch.nn.MultiheadAttention` does.
        drop: Dropout behind the projection.
    """

    def __init__(
        self,
        mixer: nn.Module,
        *,
        size: Size | None,
        prefix_tokens: int = 0,
        returns_weights: bool = False,
        drop: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.mixer = mixer
        self.drop = drop if drop is not None else nn.Identity()
        self.size, self.prefix_tokens, self.returns_weights = size, prefix_tokens, returns_weights

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Mix ``(B, N, C)``; a mask raises ValueError, for these mixers have no place for it."""
        for mask in (*args, *kwargs.values()):
            if isinstance(mask, Tensor) and mask.shape != x.shape:  # q, k and v are one tensor where three are given
                raise ValueError("a converted attention takes no mask")
        given = next((a for a in args if isinstance(a, (list, tuple)) and len(a) == 2), None)  # PVTv2 says the size
        y = self.drop(self.mixer(x, self._size(x.shape[1], given)))
        return (y, None) if self.returns_weights else y

    def _size(self, tokens: int, given: Any) -> Size | None:
        if given is not None:
            return int(given[0]), int(given[1])
        tokens -= self.prefix_tokens
        if self.size is not None and self.size[0] * self.size[1] == tokens:
            return self.size
        side = math.isqrt(tokens)
        return (side, side) if side * side == tokens else None


def convert(
    model: nn.Module,
    mixer: Mixer,
    *,
    include: Iterable[str] = ("*",),
    exclude: Iterable[str] = (),
    copy_weights: bool = True,
    **mixer_kwargs: Any,
) -> nn.Module:
    """Replace softmax attention by another mixer, in place: the model then computes something else.

    Known are timm's ViT and DeiT, Swin and PVTv2, torchvision's ViT, and the plain attention of this library's hosts.
    What was replaced and what was refused is logged, and `convert_report` tells it. To load the weights of a converted
    model, convert a fresh one in the same way first.

    Args:
        model: The model.
        mixer: ``"pure_infsa"`` and ``"linear_infsa"`` (InfViT), ``"agent"``, ``"injective"`` (InLine's attention
            without its local term), ``"magnitude_aware"`` (MALA's), ``"gated"`` (softmax with an output gate),
            ``"clipped"`` (clipped softmax).
        include: Wildcards of module names; a module is replaced if it matches one of these
        exclude: and none of these.
        copy_weights: Reuse the projections of queries, keys, values and output; what a mixer has besides starts fresh.
        **mixer_kwargs: For the mixer's constructor, such as ``rho_init`` or ``gate``.

    Returns:
        ``model``.

    Raises:
        ValueError: the mixer is unknown, or no module could be replaced; the message says why.
    """
    if mixer not in MIXERS:
        raise ValueError(f"unknown mixer {mixer!r}; there are: {', '.join(MIXERS)}")
    include, exclude = list(include), list(exclude)
    report = ConvertReport()
    for name, module, parent in list(_candidates(model)):
        if not _matches(name, include) or _matches(name, exclude):
            continue
        source = _read(module, parent, model)
        if isinstance(source, str):
            report.refused[name] = source
            continue
        new = _make(mixer, source, mixer_kwargs)
        if copy_weights:
            _copy(source, new.mixer)
        like = source.proj[0]
        new.to(device=like.device, dtype=like.dtype).train(module.training)
        model.set_submodule(name, new)
        lost = f"; lost: {source.lost}" if source.lost else ""
        weights = "weights kept" if copy_weights else "fresh weights"
        report.replaced[name] = f"{type(module).__name__} -> {mixer}, {weights}{lost}"
    if not report.replaced:
        reasons = "; ".join(f"{name}: {why}" for name, why in report.refused.items()) or "none is known here or matches"
        raise ValueError(f"convert: no attention of {type(model).__name__} could be replaced ({reasons})")
    model.convert_report = report  # type: ignore[assignment]
    _logger.info("%s", report)
    return model


def convert_report(model: nn.Module) -> ConvertReport:
    """Return what the last `convert` of ``model`` did; an empty report if there was none."""
    report = getattr(model, "convert_report", None)
    return report if isinstance(report, ConvertReport) else ConvertReport()


@dataclass
class _Source:
    """An attention module taken apart: weight and bias of each projection, and where it stands."""

    dim: int
    heads: int
    qkv: tuple[Tensor, Tensor | None]
    proj: tuple[Tensor, Tensor | None]
    size: Size | None = None
    prefix_tokens: int = 0
    returns_weights: bool = False
    drop: nn.Module | None = None
    lost: str = ""


KNOWN = (Attention, SwinAttention, PvtAttention, nn.MultiheadAttention, SoftmaxAttention)


def _candidates(model: nn.Module) -> Iterable[tuple[str, nn.Module, nn.Module]]:
    parents = dict(model.named_modules())
    for name, module in parents.items():
        if isinstance(module, KNOWN) and name:
            yield name, module, parents[name.rpartition(".")[0]]


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatch(name, p) for p in patterns)


def _read(module: Any, parent: Any, model: Any) -> _Source | str:
    """Take a module apart, or say why it cannot be replaced."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if isinstance(module, Attention):
        if module.attn_dim != module.proj.out_features or module.qkv.in_features != module.proj.out_features:
            return f"its heads are {module.attn_dim} channels wide, its input {module.qkv.in_features}"
        named = {"q_norm": "a norm of queries and keys", "norm": "a norm before the projection"}
        extras = [what for key, what in named.items() if not isinstance(getattr(module, key), nn.Identity)]
        if extras or module.gate is not None:
            return f"it has {' and '.join(extras) or 'an output gate'}, which the mixers do not"
        prefix = getattr(model, "num_prefix_tokens", 0)
        weights = (_pair(module.qkv), _pair(module.proj))
        return _Source(module.qkv.in_features, module.num_heads, *weights, grid, prefix, drop=module.proj_drop)
    if isinstance(module, SwinAttention):
        if isinstance(parent, SwinTransformerBlock) and any(parent.shift_size):
            return "its windows are shifted and need a mask"
        weights = (_pair(module.qkv), _pair(module.proj))
        return _Source(
            module.dim,
            module.num_heads,
            *weights,
            module.window_size,
            drop=module.proj_drop,
            lost="relative position bias",
        )
    if isinstance(module, PvtAttention):
        lost = "spatial reduction of keys and values" if module.sr is not None else ""
        q, kv = module.q, module.kv
        qkv = (torch.cat([q.weight, kv.weight]), None if q.bias is None else torch.cat([q.bias, kv.bias]))
        return _Source(module.dim, module.num_heads, qkv, _pair(module.proj), drop=module.proj_drop, lost=lost)
    if isinstance(module, nn.MultiheadAttention):
        if not module.batch_first or module.in_proj_weight is None or module.bias_k is not None:
            return "it is not batch first, or has other widths or biases for keys and values"
        if not hasattr(model, "class_token"):
            return "only torchvision's vision transformer is known to call it without masks"
        side = model.image_size // model.patch_size
        qkv = (module.in_proj_weight, module.in_proj_bias)
        return _Source(module.embed_dim, module.num_heads, qkv, _pair(module.out_proj), (side, side), 1, True)
    size = getattr(getattr(model, "stem", None), "grid_size", None)
    return _Source(module.qkv.in_features, module.num_heads, _pair(module.qkv), _pair(module.proj), size, 1)


def _pair(linear: Any) -> tuple[Tensor, Tensor | None]:
    return linear.weight, linear.bias


def _make(mixer: str, source: _Source, kwargs: dict[str, Any]) -> Converted:
    makers: dict[str, Callable[..., nn.Module]] = {
        "pure_infsa": lambda **kw: InfiniteAttention(source.dim, form="pure", **kw),
        "linear_infsa": lambda **kw: InfiniteAttention(source.dim, form="linear", **kw),
        "injective": lambda **kw: TokenLinearAttention(source.dim, normalization="injective", **kw),
        "magnitude_aware": lambda **kw: TokenLinearAttention(source.dim, normalization="magnitude_aware", **kw),
        "gated": lambda **kw: GatedAttention(source.dim, **{"gate": "linear", **kw}),
        "clipped": lambda **kw: GatedAttention(source.dim, **{"clip": (-0.003, 1.003), **kw}),
        "agent": lambda **kw: AgentAttention(
            source.dim,
            **{"agents": (7, 7), "size": source.size or (14, 14), "prefix_tokens": source.prefix_tokens, **kw},
        ),
    }
    return Converted(
        makers[mixer](num_heads=source.heads, **kwargs),
        size=source.size,
        prefix_tokens=source.prefix_tokens,
        returns_weights=source.returns_weights,
        drop=source.drop,
    )


@torch.no_grad()
def _copy(source: _Source, mixer: Any) -> None:
    for linear, (weight, bias) in ((mixer.qkv, source.qkv), (mixer.proj, source.proj)):
        linear.weight.copy_(weight)
        if bias is None:
            nn.init.zeros_(linear.bias)
        else:
            linear.bias.copy_(bias)
