"""Model, loss, optimiser and schedule of a run, all of them timm's."""

from __future__ import annotations

import difflib
from typing import Any

import timm
from timm.data import resolve_model_data_config
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from visionattn.train.config import TrainConfig, ValidateConfig
from visionattn.train.data import DataConfig
from visionattn.train.errors import ConfigError


def build_model(name: str, **kwargs: Any) -> nn.Module:
    """Create a registered model.

    Args:
        name: as `timm.create_model` takes it.
        kwargs: the model's arguments; those that are ``None`` are left out.

    Raises:
        ConfigError: no model has this name (the message names the closest ones), or it does not take an argument.
    """
    base = name.partition(".")[0]
    if "/" not in name and ":" not in name and not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), n=3)
        raise ConfigError(f"unknown model {name!r}" + (f"; did you mean {' or '.join(close)}?" if close else ""))
    try:
        return timm.create_model(name, **kwargs)
    except TypeError as error:
        given = {key: value for key, value in kwargs.items() if value is not None}
        raise ConfigError(f"the model {name} does not take its arguments {given}: {error}") from error


def resolve_data(model: nn.Module, cfg: TrainConfig | ValidateConfig, in_chans: int) -> DataConfig:
    """Size and normalisation: from the configuration where it says, else from the model."""
    names = ("input_size", "img_size", "crop_pct", "crop_mode", "mean", "std", "interpolation")
    given = {name: getattr(cfg, name) for name in names if getattr(cfg, name) is not None}
    try:
        resolved = resolve_model_data_config(model, {"in_chans": in_chans, **given})
    except AssertionError as error:
        raise ConfigError(f"mean and std need one number or one a channel ({in_chans}), got {given}") from error
    return DataConfig(**{name: resolved[name] for name in DataConfig._fields})


def build_loss(cfg: TrainConfig) -> nn.Module:
    """The training loss: cross-entropy, soft where targets are mixed, or binary with `bce_loss`."""
    if cfg.bce_loss:
        return BinaryCrossEntropy(
            smoothing=0.0 if cfg.mixing else cfg.smoothing, target_threshold=cfg.bce_target_thresh
        )  # fmt: skip
    if cfg.mixing:
        return SoftTargetCrossEntropy()  # the mixture smooths the targets itself
    return LabelSmoothingCrossEntropy(cfg.smoothing) if cfg.smoothing else nn.CrossEntropyLoss()


def learning_rate(cfg: TrainConfig, global_batch: int) -> float:
    """`lr` where it is given, else `lr_base` scaled from `lr_base_size` to the global batch."""
    if cfg.lr is not None:
        return cfg.lr
    factor = global_batch / cfg.lr_base_size
    return cfg.lr_base * (factor**0.5 if cfg.lr_base_scale == "sqrt" else factor)


def build_optimizer(model: nn.Module, cfg: TrainConfig, lr: float) -> Optimizer:
    """Create the optimiser, without weight decay on biases, norms and what the model exempts.

    Raises:
        ConfigError: unknown optimiser, or arguments that it does not take.
    """
    extra = {"eps": cfg.opt_eps, "betas": cfg.opt_betas, "layer_decay": cfg.layer_decay, **cfg.opt_kwargs}
    try:
        optimizer = create_optimizer_v2(
            model, opt=cfg.opt, lr=lr, weight_decay=cfg.weight_decay, momentum=cfg.momentum,
            **{name: value for name, value in extra.items() if value is not None},
        )  # fmt: skip
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"cannot make the optimiser {cfg.opt!r}: {error}") from error
    for text, factor in cfg.lr_scale.items():
        _scale_lr(optimizer, model, text, factor)
    if cfg.sched == "none":  # otherwise the schedule multiplies by the scale
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
    return optimizer


def _scale_lr(optimizer: Optimizer, model: nn.Module, text: str, factor: float) -> None:
    """Put the parameters whose name holds ``text`` into groups of their own, whose learning rate is scaled."""
    chosen = {parameter for name, parameter in model.named_parameters() if text in name}
    if not chosen:
        raise ConfigError(f"lr_scale: no parameter of the model has {text!r} in its name")
    for group in list(optimizer.param_groups):
        inside = [parameter for parameter in group["params"] if parameter in chosen]
        outside = [parameter for parameter in group["params"] if parameter not in chosen]
        scale = group.get("lr_scale", 1.0) * factor
        if not outside:
            group["lr_scale"] = scale
        elif inside:
            group["params"] = outside
            optimizer.add_param_group({**group, "params": inside, "lr_scale": scale})


def build_scheduler(optimizer: Optimizer, cfg: TrainConfig, updates_per_epoch: int) -> tuple[Scheduler | None, int]:
    """Create the learning rate schedule.

    It is stepped by hand with the number of updates (or epochs): a scheduler given to accelerate would step once a
    process.

    Returns:
        The schedule (``None`` keeps the learning rate) and the number of epochs with the cool-down.

    Raises:
        ConfigError: unknown schedule.
    """
    warmup: Any = cfg.warmup_epochs  # a fraction of an epoch is fine, whatever timm's annotation says
    try:
        scheduler, epochs = create_scheduler_v2(
            optimizer, sched=cfg.sched, num_epochs=cfg.epochs, warmup_epochs=warmup,
            warmup_lr=cfg.warmup_lr, min_lr=cfg.min_lr, cooldown_epochs=cfg.cooldown_epochs,
            decay_epochs=cfg.decay_epochs, decay_milestones=list(cfg.decay_milestones), decay_rate=cfg.decay_rate,
            step_on_epochs=not cfg.sched_on_updates, updates_per_epoch=updates_per_epoch,
            plateau_mode="min" if cfg.eval_metric == "loss" else "max", noise_seed=cfg.seed,
        )  # fmt: skip
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"cannot make the schedule {cfg.sched!r}: {error}") from error
    return scheduler, epochs
