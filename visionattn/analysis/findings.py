"""All that is looked for in one image, and why what is missing is missing."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.analysis._stages import UnknownLayerError
from visionattn.analysis.attention import AttentionLayer, NoAttentionError, Recording, record_attention
from visionattn.analysis.features import feature_maps
from visionattn.analysis.gradients import GradCam, NoEvidenceError, ReceptiveField, grad_cam
from visionattn.analysis.rollouts import Rollout, UndefinedError, rollout

METHODS = ("attention", "rollout", "gradcam", "erf", "features")
CLASSES = 2  # that Grad-CAM looks for, unless one is named


@dataclass
class Findings:
    """What `look` found in one image.

    Attributes:
        logits: Of all classes, ``(classes,)``.
        attention: Layers whose tokens' places are known, and channel attention.
        rollout: See `visionattn.analysis.rollout`.
        cams: Grad-CAM of the likeliest classes, or of the one that was named.
        fields: Effective receptive fields of the model, handed in.
        features: Maps ``(C, H, W)`` by layer.
        reasons: Why a method has nothing to show, by its name.
        unseen: Attention layers that cannot be shown.
    """

    logits: Tensor
    attention: list[AttentionLayer] = field(default_factory=list)
    rollout: Rollout | None = None
    cams: list[GradCam] = field(default_factory=list)
    fields: list[ReceptiveField] = field(default_factory=list)
    features: dict[str, Tensor] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)


def look(
    model: nn.Module,
    x: Tensor,
    *,
    methods: Collection[str] = METHODS,
    layers: Sequence[str] | None = None,
    cam_layer: str | None = None,
    target: int | None = None,
    fields: Sequence[ReceptiveField] = (),
) -> Findings:
    """Apply methods to one image; what a model has no answer to is noted, not raised.

    Args:
        model: A classifier in eval mode, fused if it is timm's MaxViT, DaViT, ConViT or SHViT.
        x: One image ``(1, C, H, W)``, normalised as the model expects.
        methods: Of `METHODS`.
        layers: Attention layers to keep; all if None.
        cam_layer: Layer of Grad-CAM; the last stage if None.
        target: Class of Grad-CAM; the likeliest ones if None.
        fields: Effective receptive fields to pass on.

    Raises:
        ValueError: a method, a layer or a class does not exist.
    """
    check_methods(methods)
    found = Findings(torch.empty(0), fields=list(fields))
    found.reasons = {name: "Not asked for." for name in METHODS if name not in methods}
    output: Any
    recording = None
    try:
        if "attention" in methods or "rollout" in methods:
            recording = record_attention(model, x)
    except NoAttentionError as e:
        found.reasons |= {name: str(e) for name in ("attention", "rollout") if name in methods}
    if recording is not None:
        output = recording.output
        _attention(found, model, recording, methods, layers)
    else:
        with torch.no_grad():
            output = model(x)
    found.logits = output[0].float()
    if "gradcam" in methods:
        _cams(found, model, x, cam_layer, target)
    if "features" in methods:
        try:
            found.features = feature_maps(model, x)
        except UnknownLayerError as e:
            found.reasons["features"] = f"Nothing to show: {e}."
    if "erf" in methods and not found.fields:
        found.reasons["erf"] = "No receptive fields were derived: receptive_fields() does so, and needs to know stages."
    return found


def check_methods(methods: Collection[str]) -> None:
    """Raise ValueError if a method is none of `METHODS`, or if there is none."""
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ValueError(f"unknown method {', '.join(unknown) or '(none)'}; there are {', '.join(METHODS)}")


def _attention(
    found: Findings, model: nn.Module, recording: Recording, methods: Collection[str], names: Sequence[str] | None
) -> None:
    kept = recording.layers if names is None else [recording.layer(name) for name in names]
    if "attention" in methods:
        found.attention = [x for x in kept if x.grid is not None or x.operator == "channel_attention"]
        found.unseen = [*recording.unseen, *(x.name for x in kept if x not in found.attention)]
        if not found.attention:
            found.reasons["attention"] = "Nothing says where on the image the tokens of its layers lie."
    if "rollout" in methods:
        try:
            found.rollout = rollout(model, recording)
        except UndefinedError as e:
            found.reasons["rollout"] = f"Not defined here: {e}."


def _cams(found: Findings, model: nn.Module, x: Tensor, layer: str | None, target: int | None) -> None:
    likeliest = found.logits.topk(min(CLASSES, len(found.logits))).indices.tolist() if target is None else [target]
    if not likeliest:
        found.reasons["gradcam"] = "The model has no classes."
        return
    try:
        found.cams = [grad_cam(model, x, layer=layer, target=c) for c in likeliest]
    except (NoEvidenceError, UnknownLayerError) as e:
        if layer is not None and isinstance(e, UnknownLayerError):
            raise  # the caller named it
        found.reasons["gradcam"] = f"Nothing to show: {e}."
