"""Weights of backbones: ImageNet files and dense backbones, the authors' and our own, read without running code."""

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from visionattn.models import _timm
from visionattn.models._checkpoint import (
    CheckpointError,
    OfficialWeights,
    adapt_first_conv,
    misfits,
    read_checkpoint,
    unwrap,
)

if TYPE_CHECKING:
    from visionattn.dense.backbone import Backbone

_logger = logging.getLogger(__name__)

OURS = re.compile(r"^(?:norms|pyramid)\.")
AUTHORS = re.compile(r"^(?:extra_norms\.|norm)(\d)\.(weight|bias)$")  # of outputs: BiFormer's and MALA's, the others'


def load_backbone(backbone: "Backbone", path: str | Path) -> None:
    """Load a weight file into a backbone.

    Takes a classifier's weights (its head and last norm are left out, the norms of the outputs keep their initial
    values), a dense backbone's, and a whole detector's or segmenter's (its neck and heads are left out). Every key
    must fit.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is unreadable, holds code, or was made for another model.
    """
    state = unwrap(read_checkpoint(path), use_ema=getattr(backbone.model, "official_ema", False), name=str(path))
    # What a dense file holds besides the model: norms of outputs, and a pyramid.
    authors = backbone.authors_norm_outputs
    besides = {k: v for k, v in state.items() if OURS.match(k) or (authors and AUTHORS.match(k))}
    state = {k.removeprefix("model."): v for k, v in state.items() if k not in besides}
    with torch.device("meta"):
        whole = backbone.create()  # the authors' keys are mapped on the model with all its stages, as published
    if isinstance(whole, OfficialWeights) and isinstance(backbone.model, OfficialWeights):
        state = whole.from_official(state)
        backbone.model.settle(state)
    else:
        state = _timm.from_official(whole, state)
    adapt_first_conv(backbone.model, state)
    own = backbone.model.state_dict()
    pruned = set(whole.state_dict()) - set(own)
    state = {k: v for k, v in state.items() if k not in pruned and not k.startswith(("head.", "head_dist."))}
    problems = misfits(state, own)

    own_besides = {k: v for k, v in backbone.state_dict().items() if not k.startswith("model.")}
    besides = {AUTHORS.sub(r"norms.\1.\2", k): v for k, v in besides.items()}
    outputs = tuple(f"norms.{i}." for i in backbone.out_indices)
    besides = {k: v for k, v in besides.items() if k.startswith(("pyramid.", *outputs))}
    if besides:
        problems += misfits(besides, own_besides)
    elif own_besides:
        _logger.info("%s has weights of the model alone; %d tensors behind it start afresh", path, len(own_besides))
    if problems:
        raise CheckpointError(
            f"{path} does not fit {backbone.name}; nothing was loaded. {' '.join(problems)} Give the backbone the "
            "name, norm_outputs and arguments that the file was made for."
        )
    backbone.load_state_dict({**own_besides, **besides, **{f"model.{k}": v for k, v in {**own, **state}.items()}})
