"""Any family as the backbone of a detector or a segmenter."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import timm
from timm.layers import LayerNorm2d
from timm.models import group_parameters, model_entrypoint
from timm.models.davit import DaVit
from timm.models.maxxvit import MaxxVit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from visionattn.dense.errors import BackboneError
from visionattn.dense.pyramid import SimplePyramid
from visionattn.dense.weights import load_backbone
from visionattn.fuse import fuse
from visionattn.models import list_models
from visionattn.models._hosts.cswin import CSwin
from visionattn.models._hosts.swin import Swin
from visionattn.models.biformer import BiFormer
from visionattn.models.litv2 import LITv2
from visionattn.models.mala import MALA
from visionattn.models.nat import NAT

TIMM_FAMILIES = ("maxxvit", "davit", "convit", "shvit")  # timm's modules whose models `fuse` knows

# Which stages' outputs the families' dense code norms, and the eps; other families norm none. Of LITv2, this is the
# detector's choice (its segmenter norms all four); Agent Attention's is Swin's, which InLine and CSwin follow here.
OUTPUT_NORMS: dict[type[nn.Module], tuple[float, tuple[int, ...]]] = {
    BiFormer: (1e-6, (0, 1, 2, 3)),
    MALA: (1e-6, (0, 1, 2, 3)),
    NAT: (1e-5, (0, 1, 2, 3)),
    LITv2: (1e-5, (1, 2, 3)),
    Swin: (1e-5, (0, 1, 2, 3)),
    CSwin: (1e-5, (0, 1, 2, 3)),
    DaVit: (1e-5, (0, 1, 2, 3)),
}


class Backbone(nn.Module):
    """Feature maps of any model of the library, and of timm's MaxViT, DaViT, ConViT and SHViT (fused).

    In mmdetection and mmsegmentation it is ``type="visionattn.Backbone"``, with
    ``custom_imports = dict(imports=["visionattn.dense"])``. Any image size runs, padded or not. Hierarchical models
    return the maps after their stages (strides 4 to 32; SHViT 16 to 64); plain ones (DeiT, gated, InfViT, ConViT,
    isotropic NAT) a simple feature pyramid of their last map, strides 4, 8, 16 and 32.

    What else the authors' dense code sets is an argument of the model: BiFormer's ``n_win`` (16 for detection, 8 for
    segmentation), TransNeXt's ``bias_mode`` and ``img_size`` (interpolated, from 800 for detection and 512 for
    segmentation), DiNAT's ``dilations``, LITv2's ``local_ws``, Agent Attention's ``pools``.

    Args:
        name: A registered model.
        out_indices: Levels to return, from 0 for the finest; all if None.
        pretrained: Weight file to start from, the authors' or one written here, for ImageNet or dense; read by
            `init_weights`, without running anything in it. True takes timm's published weights.
        init_cfg: The same in mmengine's form: ``dict(type="Pretrained", checkpoint="weights.pth")``.
        norm_outputs: Layer norms on the outputs: all, none or those of the levels named; as the family's dense code
            does if None. Plain models have one norm, their last: True applies it, None does not.
        frozen_stages: Train neither the stem nor the first stages (blocks of a plain model), this many; -1 trains all.
        norm_eval: Keep the running statistics of batch norms, as small batches call for.
        grad_checkpointing: Keep no activations inside blocks, compute them again in the backward pass.
        pyramid_channels: Width of the pyramid of plain models.
        **kwargs: Arguments of the model, such as ``drop_path_rate``.

    Attributes:
        out_channels_list: Channels of each output.
        strides: Strides of each output.

    Raises:
        BackboneError: Unknown name, level or norm; the message lists what there is.
    """

    def __init__(
        self,
        name: str,
        *,
        out_indices: Sequence[int] | None = None,
        pretrained: str | Path | bool | None = None,
        init_cfg: dict[str, Any] | None = None,
        norm_outputs: bool | Sequence[int] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        grad_checkpointing: bool = False,
        pyramid_channels: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        _check_name(name)
        self.name = name
        self.pretrained = _source(pretrained, init_cfg)
        self.norm_eval = norm_eval
        self._kwargs = kwargs
        self.model: Any = self.create(pretrained=self.pretrained is True)
        info = self.model.feature_info
        blocks = getattr(self.model, "stages", None)
        blocks = self.model.blocks if blocks is None else blocks
        self.plain = len({entry["reduction"] for entry in info}) == 1
        first = len(info) - len(blocks)  # MaxViT's first feature is the stem's
        dims = [entry["num_chs"] for entry in info[first:]]
        reductions = [entry["reduction"] for entry in info[first:]]
        levels = 4 if self.plain else len(dims)
        self.out_indices = _levels("out_indices", out_indices, levels, name)
        self._take = [len(info) - 1] if self.plain else [first + i for i in self.out_indices]

        self.even_maps = isinstance(self.model, MaxxVit)  # the two branches of a stride may round odd sizes differently
        eps, usual = next((v for cls, v in OUTPUT_NORMS.items() if isinstance(self.model, cls)), (1e-6, ()))
        self.authors_norm_outputs = bool(usual)
        self.norms = nn.ModuleDict()
        self._final_norm = False
        if self.plain:
            if not (norm_outputs is None or isinstance(norm_outputs, bool)):
                raise BackboneError(
                    f"{name} has one map, so norm_outputs must be True, False or None, got {norm_outputs}"
                )
            self._final_norm = bool(norm_outputs)
            self.pyramid: SimplePyramid | None = SimplePyramid(
                dims[-1], pyramid_channels, reductions[-1], [4 * 2**i for i in self.out_indices]
            )
            self.out_channels_list = [pyramid_channels] * len(self.out_indices)
            self.strides = [4 * 2**i for i in self.out_indices]
        else:
            if norm_outputs is None:
                normed: Iterable[int] = usual
            elif isinstance(norm_outputs, bool):
                normed = range(levels) if norm_outputs else ()
            else:
                normed = _levels("norm_outputs", norm_outputs, levels, name)
            self.norms = nn.ModuleDict({str(i): LayerNorm2d(dims[i], eps=eps) for i in self.out_indices if i in normed})
            self.pyramid = None
            self.out_channels_list = [dims[i] for i in self.out_indices]
            self.strides = [reductions[i] for i in self.out_indices]

        self.model.prune_intermediate_layers(self._take, prune_norm=not self._final_norm, prune_head=True)
        if getattr(self.model, "pre_logits", None) is not None:
            self.model.pre_logits = None
        if grad_checkpointing:
            self.model.set_grad_checkpointing(True)
        self._freeze(frozen_stages, len(blocks))

    def create(self, *, pretrained: bool = False) -> Any:
        """Return the whole model, unpruned, fused where it is timm's own."""
        return fuse(timm.create_model(self.name, pretrained=pretrained, num_classes=0, **self._kwargs))

    def init_weights(self) -> None:
        """Load the weight file that the constructor was given; mmengine calls this before training."""
        if isinstance(self.pretrained, (str, Path)):
            load_backbone(self, self.pretrained)

    def undecayed(self) -> set[str]:
        """Return the names of the model's parameters that weight decay leaves out, besides 1-D ones."""
        return set(getattr(self.model, "no_weight_decay", set)())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the maps ``(B, C, H / stride, W / stride)``, rounded up or down as the family does, of images."""
        size = x.shape[2:]
        if self.even_maps:
            x = F.pad(x, (0, -size[1] % self.strides[-1], 0, -size[0] % self.strides[-1]))
        maps = self.model.forward_intermediates(
            x, indices=self._take, norm=self._final_norm, stop_early=True, intermediates_only=True
        )
        if self.pyramid is not None:
            maps = self.pyramid(maps[-1])
        if self.pyramid is not None or self.even_maps:  # without what padding the image to whole patches added
            maps = [y[:, :, : -(-size[0] // s), : -(-size[1] // s)] for y, s in zip(maps, self.strides, strict=True)]
        keys = [str(i) for i in self.out_indices]
        return tuple(self.norms[k](y) if k in self.norms else y for k, y in zip(keys, maps, strict=True))

    def train(self, mode: bool = True) -> "Backbone":
        """Set training mode, but for what is frozen and, if ``norm_eval``, for batch norms."""
        super().train(mode)
        for module in self.modules():
            frozen = [not p.requires_grad for p in module.parameters()]
            if (frozen and all(frozen)) or (self.norm_eval and isinstance(module, _BatchNorm)):
                module.eval()
        return self

    def _freeze(self, stages: int, most: int) -> None:
        if not -1 <= stages <= most:
            raise BackboneError(
                f"{self.name} has {most} stages, so frozen_stages must be in [-1, {most}], got {stages}"
            )
        # Group 0 is the stem; each stage, or block of a plain model, has one of its own.
        groups = group_parameters(self.model, self.model.group_matcher(coarse=True), reverse=True)
        for key, parameter in self.model.named_parameters():
            if groups[key] <= stages:
                parameter.requires_grad_(False)


def _check_name(name: str) -> None:
    own = list_models()
    timms = [n for n in timm.list_models() if model_entrypoint(n).__module__.split(".")[-1] in TIMM_FAMILIES]
    base = name.partition(".")[0]
    if base not in own and base not in timms:
        close = difflib.get_close_matches(name, [*own, *timms], n=4, cutoff=0.5)
        hint = f"Did you mean {', '.join(close)}? " if close else ""
        raise BackboneError(
            f"no backbone is called {name!r}. {hint}visionattn.list_models() lists all, besides timm's MaxViT, DaViT, "
            "ConViT and SHViT."
        )


def _source(pretrained: str | Path | bool | None, init_cfg: dict[str, Any] | None) -> str | Path | bool | None:
    if init_cfg is None:
        return pretrained or None
    if init_cfg.get("type") != "Pretrained" or not isinstance(init_cfg.get("checkpoint"), (str, Path)):
        raise BackboneError(
            f"init_cfg must be dict(type='Pretrained', checkpoint=<weight file>), got {dict(init_cfg)}; other "
            "initialisations are the model's own"
        )
    if pretrained:
        raise BackboneError(f"pretrained={pretrained!r} and init_cfg both name weights; give one")
    return init_cfg["checkpoint"]


def _levels(argument: str, given: Sequence[int] | None, count: int, name: str) -> tuple[int, ...]:
    levels = tuple(range(count)) if given is None else tuple(given)
    if not levels or list(levels) != sorted(set(levels)) or not all(0 <= i < count for i in levels):
        raise BackboneError(
            f"{name} has {count} levels: {argument} must be a rising choice of 0 to {count - 1}, got {list(levels)}"
        )
    return levels
