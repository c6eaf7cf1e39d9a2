"""timm's contract, written once: classifier, features, checkpointing, parameter groups, pruning. No arithmetic.

A family subclasses `Backbone`, fills ``stem``, ``stages`` and ``norm``, and says in which layout its maps travel.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from timm.layers import ClassifierHead
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models._hub import generate_readme as generate_readme
from timm.models._input import update_model_args as update_model_args
from timm.models._input import update_model_input_size as update_model_input_size
from torch import Tensor, nn

from visionattn.models._checkpoint import OfficialWeights
from visionattn.ops._dispatch import exporting

Indices = int | list[int] | None


class Stage(nn.Module):
    """A stage of a hierarchical backbone: downsample, then blocks, then an optional norm.

    Args:
        downsample: Brings the last stage's map to this stage's size and width; `nn.Identity` where there is none.
        blocks: Map to map of the same shape.
        norm: Ends the stage; its output is both the stage's feature and the next stage's input.
    """

    def __init__(self, downsample: nn.Module, blocks: Iterable[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm if norm is not None else nn.Identity()
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
        return self.norm(x)


class Backbone(OfficialWeights, nn.Module):
    """Base of every backbone made of a stem and a run of stages.

    Subclasses set, after ``super().__init__``:

    - ``stem``: image ``(B, in_chans, H, W)`` to the first map.
    - ``stages``: `nn.ModuleList`, map to map; a `Stage` each, or single blocks in an isotropic backbone.
    - ``norm``: map to map, before pooling; `nn.Identity` where there is none.

    Args:
        dims: Channels of each entry of ``stages``.
        reductions: Stride of each entry with respect to the image.
        in_chans: Channels of the image.
        num_classes: Classes; 0 leaves the classifier out.
        global_pool: timm's pooling names; ``""`` leaves pooling out.
        drop_rate: Dropout before the classifier.
    """

    layout: ClassVar[Literal["NHWC", "NCHW"]] = "NHWC"  # of the maps between stages
    isotropic: ClassVar[bool] = False  # every entry of stages is a block, at one size and width
    no_decay: ClassVar[tuple[str, ...]] = ()  # parameters whose name holds one of these get no weight decay

    stem: Any
    stages: nn.ModuleList
    norm: nn.Module
    head: Any

    def __init__(
        self,
        *,
        dims: Sequence[int],
        reductions: Sequence[int],
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = [
            {"num_chs": dim, "reduction": stride, "module": f"stages.{i}"}
            for i, (dim, stride) in enumerate(zip(dims, reductions, strict=True))
        ]
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate)
        self.grad_checkpointing = False

    # Features

    # What goes through the stages is a map, alone. A backbone of tokens overrides these four, and hands the size of
    # the map that the tokens stand for to every block.

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        """Image to what the first stage takes, and the further arguments that every stage gets."""
        return self.stem(x), ()

    def _run(self, stage: nn.Module, x: Tensor, *args: Any) -> Tensor:
        # A Stage checkpoints its blocks; the blocks of an isotropic backbone are checkpointed here.
        if self.isotropic and self.grad_checkpointing and torch.is_grad_enabled() and not torch.jit.is_scripting():
            return checkpoint(stage, x, *args)
        return stage(x, *args)

    def _nchw(self, x: Tensor, *args: Any) -> Tensor:
        """What a stage returned as a map ``(B, C, H, W)``."""
        return x.permute(0, 3, 1, 2) if self.layout == "NHWC" else x

    def _final(self, x: Tensor) -> Tensor:
        """The last stage's output, normed, in the form that `forward_head` takes."""
        return self._nchw(self.norm(x))

    def _last_side(self, pixels: int) -> int:
        """Side of the last map of images with so many pixels along it; none where it would vanish.

        Here for families that pad what their strides do not divide.
        """
        return -(-pixels // self._last_reduction())

    def _last_reduction(self) -> int:
        reduction: Any = self.feature_info[len(self.stages) - 1]["reduction"]
        return int(reduction)

    def _check_images(self, x: Tensor) -> None:
        """Raise ValueError where images are so small that a map vanishes, or its statistics."""
        if exporting():  # an exported model would be bound to the sizes that pass
            return
        if x.ndim != 4:
            raise ValueError(f"{type(self).__name__}: images must be (B, {self.in_chans}, H, W), got {tuple(x.shape)}")
        B, _, H, W = x.shape
        sides = self._last_side(H), self._last_side(W)
        if min(sides) < 1:
            least = next(n for n in itertools.count(1) if self._last_side(n))
            raise ValueError(
                f"{type(self).__name__}: images must be at least {least} x {least} pixels, got {H} x {W}: "
                "resize or pad them"
            )
        alone = self.training and B * sides[0] * sides[1] == 1
        if alone and any(isinstance(m, nn.BatchNorm2d) and m.training for m in self.modules()):
            least = next(n for n in itertools.count(1) if self._last_side(n) > 1)
            raise ValueError(
                f"{type(self).__name__}: its batch norms cannot train on one image of {H} x {W} pixels, whose last map "
                f"has one: give more images, a side of at least {least} pixels, or put the model in eval mode"
            )

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normed last map ``(B, num_features, H / reduction, W / reduction)``.

        Raises:
            ValueError: the images are too small; the message says how large they must be.
        """
        self._check_images(x)
        x, args = self._embed(x)
        for stage in self.stages:
            x = self._run(stage, x, *args)
        return self._final(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify what `forward_features` returned."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: Tensor) -> Tensor:
        """Classify ``(B, in_chans, H, W)``: logits ``(B, num_classes)``."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Indices = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps after the chosen stages, and the normed last map unless ``intermediates_only``.

        Args:
            x: Images ``(B, in_chans, H, W)``.
            indices: Stages to return: the last n, a list of numbers, or all if None.
            norm: Apply the final norm to the maps it fits: every one if isotropic, else the last stage's.
            stop_early: Do not run the stages behind the last one chosen.
            output_fmt: ``"NCHW"`` or ``"NHWC"``.
            intermediates_only: Leave out the final output.

        Raises:
            ValueError: the images are too small, or ``output_fmt`` is unknown.
        """
        self._check_images(x)
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: last + 1] if stop_early else self.stages
        maps = []
        x, args = self._embed(x)
        for i, stage in enumerate(stages):
            x = self._run(stage, x, *args)
            if i in take:
                fits = norm and (self.isotropic or i == len(self.stages) - 1)
                y = self._nchw(self.norm(x) if fits else x, *args)
                maps.append(y.permute(0, 2, 3, 1) if output_fmt == "NHWC" else y)
        if intermediates_only:
            return maps
        return self._final(x), maps

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last chosen one, and the norm and head if asked; return the chosen numbers."""
        take, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_norm or last + 1 < len(self.feature_info):
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    # Classifier

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one of ``num_classes`` (0 for none), and the pooling if named."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    # Training

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: keep no activations inside blocks, compute them again in the backward pass."""
        self.grad_checkpointing = enable
        for stage in self.stages:
            if isinstance(stage, Stage):
                stage.grad_checkpointing = enable

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's pattern map from parameter names to depth, for layer-wise learning rate decay."""
        stem = r"^stem|^cls_token|^pos_embed"
        if coarse or self.isotropic:
            return {"stem": stem, "blocks": [(r"^stages\.(\d+)", None), (r"^norm", (99999,))]}
        return {
            "stem": stem,
            "blocks": [
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.norm", (99999,)),
                (r"^stages\.(\d+)", (0,)),
                (r"^norm", (99999,)),
            ],
        }

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that must not decay, besides the biases and norms that timm leaves out."""
        return {name for name, _ in self.named_parameters() if any(key in name for key in self.no_decay)}
