"""Agent Attention on four hosts: DeiT, PVT, Swin and CSwin.

Paper: Han et al., ECCV 2024, arXiv:2312.08874. Code: https://github.com/LeapLabTHU/Agent-Attention @ 207ce3e (no
licence file; the Swin and CSwin files carry Microsoft's MIT header, the detection code Apache-2.0).
Departures: PVT has one projection for queries, keys and values, and resizes its position embedding at every other size
(the authors' classifier leaves it as it is where a later stage happens to have as many tokens as the first, and fails).
The authors' classifiers but PVT take one image size; here every size runs, as their detection code resizes the tables.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from visionattn.layers.attention.agent import AgentAttention
from visionattn.layers.attention.softmax import SoftmaxAttention
from visionattn.layers.sized import fit_tables
from visionattn.models._checkpoint import Rules, StateDict
from visionattn.models._create import cfg, create
from visionattn.models._hosts._block import Host, Mixer, Size, pair
from visionattn.models._hosts.cswin import CSwin
from visionattn.models._hosts.deit import PlainViT
from visionattn.models._hosts.pvt import PVT
from visionattn.models._hosts.swin import Swin
from visionattn.ops import Impl

AGENTS = (3, 4, 7, 7)  # sides of the grids of agents by stage

TABLES: Rules = (
    (r"\.an_bias$", ".key_bias.grid"),
    (r"\.ah_bias$", ".key_bias.rows"),
    (r"\.aw_bias$", ".key_bias.cols"),
    (r"\.ac_bias$", ".key_bias.prefix"),
    (r"\.na_bias$", ".query_bias.grid"),
    (r"\.ha_bias$", ".query_bias.rows"),
    (r"\.wa_bias$", ".query_bias.cols"),
    (r"\.ca_bias$", ".query_bias.prefix"),
)


def _reshape_tables(state: StateDict) -> StateDict:
    """Bring the authors' bias tables to ours: (heads, agents, tokens), without their axes of one."""
    return {k: _reshape_table(k, x) for k, x in state.items()}


def _reshape_table(key: str, x: Tensor) -> Tensor:
    if key.endswith(("_bias.rows", "_bias.cols")) and x.ndim == 5:
        if ".query_bias." in key:  # (1, h, H, 1, a) or (1, h, 1, W, a)
            return x[0].flatten(1, 2).transpose(1, 2)
        return x[0].flatten(2)  # (1, h, a, H, 1) or (1, h, a, 1, W)
    if key.endswith("_bias.prefix") and x.ndim == 4:
        return x[0].transpose(1, 2) if ".query_bias." in key else x[0]  # (1, h, 1, a) or (1, h, a, 1)
    return x


class AgentDeiT(PlainViT):
    """DeiT with agent attention in its first blocks.

    Args:
        dim: Channels.
        depth: Blocks.
        num_heads: Heads.
        agents: Grid of agents, or its side, that the bias tables are for.
        agent_layers: How many blocks have agents; the rest has softmax attention.
        pool: Grid of agents to use; ``agents`` if None.
        img_size: Images that the tables are for; others get resized tables.
        impl: Implementation of the attention operator.
        **kwargs: Arguments of `PlainViT`.
    """

    official_rules = ((r"^patch_embed\.", "stem."), (r"^blocks\.", "stages."), *TABLES)

    def __init__(
        self,
        *,
        dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        agents: int | Size = 7,
        agent_layers: int = 12,
        pool: int | Size | None = None,
        img_size: int | Size = 224,
        impl: Impl = "auto",
        **kwargs: Any,
    ) -> None:
        H, W = pair(img_size)
        patch = kwargs.get("patch_size", 16)

        def mixer(i: int) -> nn.Module:
            if i >= agent_layers:
                return SoftmaxAttention(dim, num_heads=num_heads)
            size = (-(-H // patch), -(-W // patch))
            return AgentAttention(
                dim, num_heads=num_heads, agents=agents, size=size, pool=pool, prefix_tokens=1, impl=impl
            )

        super().__init__(mixer=mixer, img_size=img_size, dim=dim, depth=depth, **kwargs)

    def from_official(self, state: StateDict) -> StateDict:
        """Rename the authors' keys; bring their tables to our shapes, and to our image size."""
        return fit_tables(self, _reshape_tables(super().from_official(state)))


class AgentPVT(PVT):
    """PVT with agent attention in every block.

    Args:
        num_heads: Heads by stage.
        agents: Grids of agents, or their sides, that the bias tables are for, by stage.
        pools: Grids of agents to use, by stage; ``agents`` if None. The authors use 12, 16, 28 and 28 a side for
            detection and segmentation.
        impl: Implementation of the attention operator.
        dims: Channels by stage.
        img_size: Images that the tables are for; others get resized tables.
        **kwargs: Arguments of `PVT`.
    """

    official_rules = (*PVT.official_rules, *TABLES)

    def __init__(
        self,
        *,
        num_heads: tuple[int, ...] = (1, 2, 5, 8),
        agents: tuple[int | Size, ...] = AGENTS,
        pools: tuple[int | Size, ...] | None = None,
        impl: Impl = "auto",
        dims: tuple[int, ...] = (64, 128, 320, 512),
        img_size: int | Size = 224,
        **kwargs: Any,
    ) -> None:
        mixer = _mixer(PVT, dims, num_heads, agents, None, pools, img_size, impl)
        super().__init__(mixer=mixer, dims=dims, img_size=img_size, **kwargs)

    def reshape_official(self, state: StateDict) -> StateDict:
        """Bring the authors' tensors to our shapes."""
        return _reshape_tables(super().reshape_official(state))


class AgentSwin(Swin):
    """Swin with agent attention over the whole map in the first blocks of its stages, windows in the others.

    Args:
        num_heads: Heads by stage.
        agents: Grids of agents, or their sides, that the bias tables are for, by stage.
        agent_depths: How many blocks of each stage have agents.
        pools: Grids of agents to use, by stage; ``agents`` if None. The authors use 9, 12, 14 and 7 a side for
            detection and segmentation.
        impl: Implementation of both attention operators.
        dims: Channels by stage.
        img_size: Images that the tables are for; others get resized tables.
        **kwargs: Arguments of `Swin`.
    """

    official_rules = (*Swin.official_rules, *TABLES)

    def __init__(
        self,
        *,
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        agents: tuple[int | Size, ...] = AGENTS,
        agent_depths: tuple[int, ...] = (2, 2, 6, 0),
        pools: tuple[int | Size, ...] | None = None,
        impl: Impl = "auto",
        dims: tuple[int, ...] = (96, 192, 384, 768),
        img_size: int | Size = 224,
        **kwargs: Any,
    ) -> None:
        mixer = _mixer(Swin, dims, num_heads, agents, agent_depths, pools, img_size, impl)
        super().__init__(mixer=mixer, dims=dims, num_heads=num_heads, img_size=img_size, impl=impl, **kwargs)

    def reshape_official(self, state: StateDict) -> StateDict:
        """Bring the authors' tensors to our shapes."""
        return _reshape_tables(super().reshape_official(state))


class AgentCSwin(CSwin):
    """CSwin with agent attention over the whole map in the first blocks of its stages, stripes in the others.

    Args:
        num_heads: Heads by stage.
        agents: Grids of agents, or their sides, that the bias tables are for, by stage.
        agent_depths: How many blocks of each stage have agents.
        pools: Grids of agents to use, by stage; ``agents`` if None.
        impl: Implementation of both attention operators.
        dims: Channels by stage.
        img_size: Images that the tables are for; others get resized tables.
        **kwargs: Arguments of `CSwin`.
    """

    official_rules = (*CSwin.official_rules, *TABLES)

    def __init__(
        self,
        *,
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        agents: tuple[int | Size, ...] = AGENTS,
        agent_depths: tuple[int, ...] = (2, 4, 0, 0),
        pools: tuple[int | Size, ...] | None = None,
        impl: Impl = "auto",
        dims: tuple[int, ...] = (64, 128, 256, 512),
        img_size: int | Size = 224,
        **kwargs: Any,
    ) -> None:
        mixer = _mixer(CSwin, dims, num_heads, agents, agent_depths, pools, img_size, impl)
        super().__init__(mixer=mixer, dims=dims, num_heads=num_heads, img_size=img_size, impl=impl, **kwargs)

    def reshape_official(self, state: StateDict) -> StateDict:
        """Bring the authors' tensors to our shapes; theirs call both kinds of blocks' convolution by one name."""
        own = self.state_dict()
        state = {k if k in own else k.replace(".lepe.0.", ".dwc."): x for k, x in state.items()}
        return _reshape_tables(super().reshape_official(state))


def _mixer(
    host: type[Host],
    dims: tuple[int, ...],
    num_heads: tuple[int, ...],
    agents: tuple[int | Size, ...],
    agent_depths: tuple[int, ...] | None,
    pools: tuple[int | Size, ...] | None,
    img_size: int | Size,
    impl: Impl,
) -> Mixer:
    """Agent attention in the first ``agent_depths`` blocks of each stage (all if None), the host's own in others."""
    if min(len(x) for x in (num_heads, agents, agent_depths or agents, pools or agents)) < len(dims):
        raise ValueError(f"num_heads, agents, agent_depths and pools must have an entry a stage, {len(dims)}")
    sizes = host.map_sizes(img_size)

    def mixer(s: int, i: int) -> nn.Module | None:
        if agent_depths and i >= agent_depths[s]:
            return None
        pool = pools[s] if pools else None
        return AgentAttention(dims[s], num_heads=num_heads[s], agents=agents[s], size=sizes[s], pool=pool, impl=impl)

    return mixer


DEIT_B: dict[str, Any] = {"dim": 768, "num_heads": 12, "agents": 9, "agent_layers": 4}
SWIN_S: dict[str, Any] = {"depths": (2, 2, 18, 2), "agent_depths": (2, 2, 0, 0)}
SWIN_B: dict[str, Any] = {
    "dims": (128, 256, 512, 1024),
    "depths": (2, 2, 18, 2),
    "num_heads": (4, 8, 16, 32),
    "agent_depths": (2, 2, 2, 0),
}
CSWIN_S: dict[str, Any] = {"depths": (3, 6, 29, 2), "agent_depths": (3, 6, 0, 0)}
CSWIN_B: dict[str, Any] = {**CSWIN_S, "dims": (96, 192, 384, 768), "num_heads": (4, 8, 16, 32)}

ARCHS: dict[str, dict[str, Any]] = {
    "agent_deit_t": {},
    "agent_deit_s": {"dim": 384, "num_heads": 6},
    "agent_deit_s_448": {"dim": 384, "num_heads": 6, "img_size": 448},
    "agent_deit_b": DEIT_B,
    "agent_pvt_t": {},
    "agent_pvt_s": {"depths": (3, 4, 6, 3)},
    "agent_pvt_m": {"depths": (3, 4, 18, 3)},
    "agent_pvt_m_256": {"depths": (3, 4, 18, 3), "img_size": 256},
    "agent_pvt_l": {"depths": (3, 8, 27, 3)},
    "agent_swin_t": {},
    "agent_swin_s": SWIN_S,
    "agent_swin_s_288": {**SWIN_S, "img_size": 288},
    "agent_swin_b": SWIN_B,
    "agent_swin_b_384": {**SWIN_B, "img_size": 384},
    "agent_cswin_t": {},
    "agent_cswin_s": CSWIN_S,
    "agent_cswin_b": CSWIN_B,
    "agent_cswin_b_384": {**CSWIN_B, "img_size": 384},
}


def _cfg(name: str) -> dict[str, Any]:
    side = ARCHS[name].get("img_size", 224)
    return cfg(
        input_size=(3, side, side),
        pool_size=(side // 32, side // 32),
        crop_pct=1.0 if name in ("agent_swin_s_288", "agent_swin_b_384") else 0.875,
        crop_mode="squash",  # the authors resize to a square, whatever the image's shape
        first_conv="stem.proj" if "deit" in name or "_swin" in name else "stem.0",
        classifier="head" if "deit" in name else "head.fc",
        license="other",
        paper_ids="arXiv:2312.08874",
        origin_url="https://github.com/LeapLabTHU/Agent-Attention",
    )


default_cfgs = generate_default_cfgs({f"{name}.in1k": _cfg(name) for name in ARCHS})


@register_model
def agent_deit_t(pretrained: bool = False, **kwargs: Any) -> AgentDeiT:
    return create(AgentDeiT, ARCHS, "agent_deit_t", pretrained, **kwargs)


@register_model
def agent_deit_s(pretrained: bool = False, **kwargs: Any) -> AgentDeiT:
    return create(AgentDeiT, ARCHS, "agent_deit_s", pretrained, **kwargs)


@register_model
def agent_deit_s_448(pretrained: bool = False, **kwargs: Any) -> AgentDeiT:
    return create(AgentDeiT, ARCHS, "agent_deit_s_448", pretrained, **kwargs)


@register_model
def agent_deit_b(pretrained: bool = False, **kwargs: Any) -> AgentDeiT:
    return create(AgentDeiT, ARCHS, "agent_deit_b", pretrained, **kwargs)


@register_model
def agent_pvt_t(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    return create(AgentPVT, ARCHS, "agent_pvt_t", pretrained, **kwargs)


@register_model
def agent_pvt_s(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    return create(AgentPVT, ARCHS, "agent_pvt_s", pretrained, **kwargs)


@register_model
def agent_pvt_m(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    return create(AgentPVT, ARCHS, "agent_pvt_m", pretrained, **kwargs)


@register_model
def agent_pvt_m_256(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    return create(AgentPVT, ARCHS, "agent_pvt_m_256", pretrained, **kwargs)


@register_model
def agent_pvt_l(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    return create(AgentPVT, ARCHS, "agent_pvt_l", pretrained, **kwargs)


@register_model
def agent_swin_t(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    return create(AgentSwin, ARCHS, "agent_swin_t", pretrained, **kwargs)


@register_model
def agent_swin_s(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    return create(AgentSwin, ARCHS, "agent_swin_s", pretrained, **kwargs)


@register_model
def agent_swin_s_288(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    return create(AgentSwin, ARCHS, "agent_swin_s_288", pretrained, **kwargs)


@register_model
def agent_swin_b(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    return create(AgentSwin, ARCHS, "agent_swin_b", pretrained, **kwargs)


@register_model
def agent_swin_b_384(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    return create(AgentSwin, ARCHS, "agent_swin_b_384", pretrained, **kwargs)


@register_model
def agent_cswin_t(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:
    return create(AgentCSwin, ARCHS, "agent_cswin_t", pretrained, **kwargs)


@register_model
def agent_cswin_s(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:
    return create(AgentCSwin, ARCHS, "agent_cswin_s", pretrained, **kwargs)


@register_model
def agent_cswin_b(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:
    return create(AgentCSwin, ARCHS, "agent_cswin_b", pretrained, **kwargs)


@register_model
def agent_cswin_b_384(pretrained: bool = False, **kwargs: Any) -> AgentCSwin:
    return create(AgentCSwin, ARCHS, "agent_cswin_b_384", pretrained, **kwargs)
