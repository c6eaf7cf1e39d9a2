"""InLine attention on four hosts: DeiT, PVT, Swin and CSwin.

Paper: Han et al., NeurIPS 2024, arXiv:2412.06590. Code: https://github.com/LeapLabTHU/InLine @ e463a6f (no licence
file; the Swin and CSwin files carry Microsoft's MIT header).
Departures: PVT has one projection for queries, keys and values, and resizes its position embedding at every other size
(the authors' leaves it as it is where a later stage happens to have as many tokens as the first, and fails). The
authors' other classifiers take one image size; here every size runs, padded as in Swin's and CSwin's dense code.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from visionattn.layers.attention.inline import InLineAttention
from visionattn.models._checkpoint import Rules, StateDict
from visionattn.models._create import cfg, create
from visionattn.models._hosts._block import Mixer
from visionattn.models._hosts.cswin import CSwin
from visionattn.models._hosts.deit import PlainViT
from visionattn.models._hosts.pvt import PVT
from visionattn.models._hosts.swin import Swin
from visionattn.ops import Impl

KERNELS: Rules = ((r"\.residual\.0\.", ".residual.fc1."), (r"\.residual\.2\.", ".residual.fc2."))


class InLineDeiT(PlainViT):
    """DeiT with InLine attention.

    Args:
        dim: Channels.
        depth: Blocks.
        num_heads: Heads.
        impl: Implementation of the attention operator.
        **kwargs: Arguments of `PlainViT`.
    """

    official_rules = ((r"^patch_embed\.", "stem."), (r"^blocks\.", "stages."), *KERNELS)

    def __init__(
        self, *, dim: int = 192, depth: int = 12, num_heads: int = 6, impl: Impl = "auto", **kwargs: Any
    ) -> None:
        def mixer(i: int) -> nn.Module:
            return InLineAttention(dim, num_heads=num_heads, prefix_tokens=1, impl=impl)

        super().__init__(mixer=mixer, dim=dim, depth=depth, **kwargs)

    def from_official(self, state: StateDict) -> StateDict:
        """Rename the authors' keys; bring their kernels' layers to our shapes."""
        return _group_kernels(self, super().from_official(state))


class InLinePVT(PVT):
    """PVT with InLine attention in every block.

    Args:
        num_heads: Heads by stage.
        impl: Implementation of the attention operator.
        dims: Channels by stage.
        **kwargs: Arguments of `PVT`.
    """

    official_rules = (*PVT.official_rules, *KERNELS)

    def __init__(
        self,
        *,
        num_heads: tuple[int, ...] = (2, 4, 10, 16),
        impl: Impl = "auto",
        dims: tuple[int, ...] = (64, 128, 320, 512),
        **kwargs: Any,
    ) -> None:
        super().__init__(mixer=_mixer(dims, num_heads, None, impl), dims=dims, **kwargs)

    def reshape_official(self, state: StateDict) -> StateDict:
        """Bring the authors' tensors to our shapes."""
        return _group_kernels(self, super().reshape_official(state))


class InLineSwin(Swin):
    """Swin with InLine attention over the whole map in the first blocks of its stages, windows in the others.

    Args:
        num_heads: Heads by stage.
        inline_depths: How many blocks of each stage have InLine attention.
        impl: Implementation of both attention operators.
        dims: Channels by stage.
        **kwargs: Arguments of `Swin`.
    """

    official_rules = (*Swin.official_rules, *KERNELS)

    def __init__(
        self,
        *,
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        inline_depths: tuple[int, ...] = (2, 2, 6, 0),
        impl: Impl = "auto",
        dims: tuple[int, ...] = (96, 192, 384, 768),
        **kwargs: Any,
    ) -> None:
        mixer = _mixer(dims, num_heads, inline_depths, impl)
        super().__init__(mixer=mixer, dims=dims, num_heads=num_heads, impl=impl, **kwargs)

    def reshape_official(self, state: StateDict) -> StateDict:
        """Bring the authors' tensors to our shapes."""
        return _group_kernels(self, super().reshape_official(state))


class InLineCSwin(CSwin):
    """CSwin with InLine attention over the whole map in the first blocks of its stages, stripes in the others.

    Its InLine attention makes the local kernels from the block's input before the norm, and adds LePE.

    Args:
        num_heads: Heads by stage.
        inline_depths: How many blocks of each stage have InLine attention.
        impl: Implementation of both attention operators.
        dims: Channels by stage.
        **kwargs: Arguments of `CSwin`.
    """

    official_rules = (*CSwin.official_rules, *KERNELS)

    def __init__(
        self,
        *,
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        inline_depths: tuple[int, ...] = (2, 4, 0, 0),
        impl: Impl = "auto",
        dims: tuple[int, ...] = (64, 128, 256, 512),
        **kwargs: Any,
    ) -> None:
        mixer = _mixer(dims, num_heads, inline_depths, impl, context="block", lepe=True)
        super().__init__(mixer=mixer, dims=dims, num_heads=num_heads, impl=impl, **kwargs)

    def reshape_official(self, state: StateDict) -> StateDict:
        """Bring the authors' tensors to our shapes; theirs number the convolution of a single branch."""
        own = self.state_dict()
        state = {k if k in own else k.replace(".lepe.0.", ".lepe."): x for k, x in state.items()}
        return _group_kernels(self, super().reshape_official(state))


def _group_kernels(model: nn.Module, state: StateDict) -> StateDict:
    """Cut the weights of grouped 1 x 1 convolutions, ``(out, in / groups, 1)``, into their groups."""
    own = model.state_dict()
    out = dict(state)
    for key, x in state.items():
        if ".residual.fc" in key and key in own and x.ndim == 3 and x.shape[-1] == 1 and own[key].shape[-1] != 1:
            out[key] = x[..., 0].unflatten(0, (own[key].shape[0], -1))
    return out


def _mixer(
    dims: tuple[int, ...], num_heads: tuple[int, ...], inline_depths: tuple[int, ...] | None, impl: Impl, **kwargs: Any
) -> Mixer:
    """InLine attention in the first ``inline_depths`` blocks of each stage (all if None), the host's own in others."""
    if min(len(num_heads), len(inline_depths or num_heads)) < len(dims):
        raise ValueError(f"num_heads and inline_depths must have an entry a stage, {len(dims)}")

    def mixer(s: int, i: int) -> nn.Module | None:
        if inline_depths and i >= inline_depths[s]:
            return None
        return InLineAttention(dims[s], num_heads=num_heads[s], impl=impl, **kwargs)

    return mixer


SWIN_B: dict[str, Any] = {
    "dims": (128, 256, 512, 1024),
    "depths": (2, 2, 18, 2),
    "num_heads": (4, 8, 16, 32),
    "inline_depths": (2, 2, 2, 0),
}
CSWIN_S: dict[str, Any] = {"depths": (3, 6, 29, 2), "inline_depths": (3, 6, 0, 0)}
CSWIN_B: dict[str, Any] = {**CSWIN_S, "dims": (96, 192, 384, 768), "num_heads": (4, 8, 16, 32)}

ARCHS: dict[str, dict[str, Any]] = {
    "inline_deit_t": {},
    "inline_deit_s": {"dim": 320, "num_heads": 10, "img_size": 288},
    "inline_deit_b": {"dim": 384, "num_heads": 12, "img_size": 448},
    "inline_pvt_t": {},
    "inline_pvt_s": {"depths": (3, 4, 6, 3)},
    "inline_pvt_m": {"depths": (3, 4, 18, 3)},
    "inline_pvt_l": {"depths": (3, 8, 27, 3)},
    "inline_swin_t": {},
    "inline_swin_s": {"depths": (2, 2, 18, 2), "inline_depths": (2, 2, 0, 0)},
    "inline_swin_b": SWIN_B,
    "inline_swin_b_384": {**SWIN_B, "img_size": 384},
    "inline_cswin_t": {},
    "inline_cswin_s": CSWIN_S,
    "inline_cswin_b": CSWIN_B,
    "inline_cswin_b_384": {**CSWIN_B, "img_size": 384},
}


def _cfg(name: str) -> dict[str, Any]:
    side = ARCHS[name].get("img_size", 224)
    return cfg(
        input_size=(3, side, side),
        pool_size=(side // 32, side // 32),
        crop_pct=1.0 if name == "inline_swin_b_384" else 0.875,
        crop_mode="squash",  # the authors resize to a square, whatever the image's shape
        first_conv="stem.proj" if "deit" in name or "_swin" in name else "stem.0",
        classifier="head" if "deit" in name else "head.fc",
        license="other",
        paper_ids="arXiv:2412.06590",
        origin_url="https://github.com/LeapLabTHU/InLine",
    )


default_cfgs = generate_default_cfgs({f"{name}.in1k": _cfg(name) for name in ARCHS})


@register_model
def inline_deit_t(pretrained: bool = False, **kwargs: Any) -> InLineDeiT:
    return create(InLineDeiT, ARCHS, "inline_deit_t", pretrained, **kwargs)


@register_model
def inline_deit_s(pretrained: bool = False, **kwargs: Any) -> InLineDeiT:
    return create(InLineDeiT, ARCHS, "inline_deit_s", pretrained, **kwargs)


@register_model
def inline_deit_b(pretrained: bool = False, **kwargs: Any) -> InLineDeiT:
    return create(InLineDeiT, ARCHS, "inline_deit_b", pretrained, **kwargs)


@register_model
def inline_pvt_t(pretrained: bool = False, **kwargs: Any) -> InLinePVT:
    return create(InLinePVT, ARCHS, "inline_pvt_t", pretrained, **kwargs)


@register_model
def inline_pvt_s(pretrained: bool = False, **kwargs: Any) -> InLinePVT:
    return create(InLinePVT, ARCHS, "inline_pvt_s", pretrained, **kwargs)


@register_model
def inline_pvt_m(pretrained: bool = False, **kwargs: Any) -> InLinePVT:
    return create(InLinePVT, ARCHS, "inline_pvt_m", pretrained, **kwargs)


@register_model
def inline_pvt_l(pretrained: bool = False, **kwargs: Any) -> InLinePVT:
    return create(InLinePVT, ARCHS, "inline_pvt_l", pretrained, **kwargs)


@register_model
def inline_swin_t(pretrained: bool = False, **kwargs: Any) -> InLineSwin:
    return create(InLineSwin, ARCHS, "inline_swin_t", pretrained, **kwargs)


@register_model
def inline_swin_s(pretrained: bool = False, **kwargs: Any) -> InLineSwin:
    return create(InLineSwin, ARCHS, "inline_swin_s", pretrained, **kwargs)


@register_model
def inline_swin_b(pretrained: bool = False, **kwargs: Any) -> InLineSwin:
    return create(InLineSwin, ARCHS, "inline_swin_b", pretrained, **kwargs)


@register_model
def inline_swin_b_384(pretrained: bool = False, **kwargs: Any) -> InLineSwin:
    return create(InLineSwin, ARCHS, "inline_swin_b_384", pretrained, **kwargs)


@register_model
def inline_cswin_t(pretrained: bool = False, **kwargs: Any) -> InLineCSwin:
    return create(InLineCSwin, ARCHS, "inline_cswin_t", pretrained, **kwargs)


@register_model
def inline_cswin_s(pretrained: bool = False, **kwargs: Any) -> InLineCSwin:
    return create(InLineCSwin, ARCHS, "inline_cswin_s", pretrained, **kwargs)


@register_model
def inline_cswin_b(pretrained: bool = False, **kwargs: Any) -> InLineCSwin:
    return create(InLineCSwin, ARCHS, "inline_cswin_b", pretrained, **kwargs)


@register_model
def inline_cswin_b_384(pretrained: bool = False, **kwargs: Any) -> InLineCSwin:
    return create(InLineCSwin, ARCHS, "inline_cswin_b_384", pretrained, **kwargs)
