"""Layer-wise decay of the learning rate for any backbone of the library, in mmengine's form.

Paper: Bao et al., BEiT, arXiv:2106.08254 (appendix); the toolboxes' own constructors know ConvNeXt, BEiT and MAE alone.
"""

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS, OPTIMIZERS
from timm.optim import param_groups_layer_decay
from torch import nn

from visionattn.dense.backbone import Backbone
from visionattn.dense.errors import BackboneError


class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Parameter groups whose learning rate falls by a factor a layer, from the last block of the backbone to its stem.

    Layers are those of the model's ``group_matcher``: the stem, then each block. The last block has ``layer_decay``
    times the full rate; what is not of the backbone's model (norms of outputs, neck, heads) has the full rate. There
    is no weight decay on 1-D parameters, nor on those that the model's ``no_weight_decay`` names.

    Args:
        optim_wrapper_cfg: As for mmengine's default constructor.
        paramwise_cfg: ``layer_decay`` in (0, 1], and optionally ``custom_keys``, which maps parts of parameters' names
            to ``dict(lr_mult=..., decay_mult=...)``, further factors on both; the longest part that occurs counts.

    Raises:
        BackboneError: ``paramwise_cfg`` is not so, or the model has no ``visionattn.Backbone``.
    """

    def _validate_cfg(self) -> None:
        known, decay = {"layer_decay", "custom_keys"}, self.paramwise_cfg.get("layer_decay")
        if unknown := sorted(set(self.paramwise_cfg) - known):
            raise BackboneError(f"paramwise_cfg takes layer_decay and custom_keys, got {', '.join(unknown)}")
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 < decay <= 1:
            raise BackboneError(f"paramwise_cfg needs a layer_decay in (0, 1], got {decay!r}")
        for key, factors in self.paramwise_cfg.get("custom_keys", {}).items():
            if wrong := sorted(set(factors) - {"lr_mult", "decay_mult"}):
                raise BackboneError(f"custom_keys[{key!r}] takes lr_mult and decay_mult, got {', '.join(wrong)}")
        if self.base_lr is None:
            raise BackboneError("the optimizer needs an lr, from which layers' rates are made")

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimiser of ``model``."""
        model = getattr(model, "module", model)
        wrapper_cfg = {"type": "OptimWrapper", **self.optim_wrapper_cfg}
        optimizer = OPTIMIZERS.build({**self.optimizer_cfg, "params": self.groups(model)})
        return OPTIM_WRAPPERS.build(wrapper_cfg, default_args={"optimizer": optimizer})

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return parameter groups: ``params``, ``lr``, ``weight_decay`` and ``param_names``."""
        decay = self.paramwise_cfg["layer_decay"]
        base_wd = self.base_wd or 0.0
        backbones = [m for m in model.modules() if isinstance(m, Backbone)]
        if not backbones:
            raise BackboneError("layer-wise decay needs a model with type='visionattn.Backbone' in it, found none")
        scales: dict[int, tuple[float, float]] = {}  # of learning rate and weight decay, by parameter
        for backbone in backbones:
            for group in param_groups_layer_decay(backbone.model, base_wd, backbone.undecayed(), layer_decay=decay):
                # In timm the classifier is the layer behind the last block; it was taken off.
                scale = (group["lr_scale"] * decay, 1.0 if group["weight_decay"] or not base_wd else 0.0)
                scales.update({id(p): scale for p in group["params"]})
        custom = self.paramwise_cfg.get("custom_keys", {})
        groups: dict[tuple[float, float], dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            lr, wd = scales.get(id(parameter), (1.0, 1.0 if parameter.ndim > 1 else 0.0))
            factors = custom[max(keys, key=len)] if (keys := [k for k in custom if k in name]) else {}
            key = (self.base_lr * lr * factors.get("lr_mult", 1.0), base_wd * wd * factors.get("decay_mult", 1.0))
            group = groups.setdefault(key, {"params": [], "lr": key[0], "weight_decay": key[1], "param_names": []})
            group["params"].append(parameter)
            group["param_names"].append(name)
        return list(groups.values())
