"""What a run works with, built from its configuration: data, model, optimiser, schedule, averages."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from timm.data import Mixup, resolve_model_data_config
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils.data import IterableDataset

from visionattn import fuse, fuse_report
from visionattn.train import sharding, zero
from visionattn.train.build import (
    build_loss,
    build_model,
    build_optimizer,
    build_scheduler,
    learning_rate,
    resolve_data,
)
from visionattn.train.checkpoint import load_weights
from visionattn.train.config import TrainConfig
from visionattn.train.data import DataConfig, Loader, check_classes, class_names, open_dataset, train_loader, val_loader
from visionattn.train.distill import Distillation
from visionattn.train.errors import ConfigError
from visionattn.train.seeds import seed_all


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of one run in one process."""

    cfg: TrainConfig  # with batch_size and num_classes filled in
    accelerator: Accelerator
    dataset: Any  # the training set, without transforms
    names: tuple[str, ...] | None  # of the classes
    data: DataConfig
    loader: Loader
    val_loader: Loader
    model: nn.Module  # prepared by accelerate
    optimizer: AcceleratedOptimizer
    scheduler: Scheduler | None
    ema: ModelEmaV3 | None
    loss: nn.Module  # of the labels
    distillation: Distillation | None
    mixup: Mixup | None
    epochs: int  # with the cool-down
    batches: int  # of one process in an epoch
    lr: float

    @property
    def global_batch(self) -> int:
        """Images in an update, over all processes and accumulation steps."""
        return self.cfg.batch_size * self.cfg.grad_accum_steps * self.accelerator.num_processes

    @property
    def metric(self) -> str:
        """Column of `summary.csv` that decides which epoch is best."""
        averaged = self.ema is not None and self.cfg.best_weights != "raw"
        return f"{'eval_ema' if averaged else 'eval'}_{self.cfg.eval_metric}"

    def plain_model(self) -> nn.Module:
        """The model without the wrappers of distributed training."""
        return self.accelerator.unwrap_model(self.model)

    def describe(self) -> str:
        """One line for the beginning of a run."""
        size = sum(parameter.numel() for parameter in self.model.parameters())
        return (
            f"{self.cfg.model}: {size / 1e6:.2f} M parameters, {self.cfg.num_classes} classes, input "
            f"{'x'.join(map(str, self.data.input_size))}; {len(self.dataset)} training images, global batch "
            f"{self.global_batch}, {self.batches // self.cfg.grad_accum_steps} updates an epoch, lr {self.lr:.3g}; "
            f"{self.accelerator.num_processes} x {self.accelerator.device.type}"
        )


def assemble(cfg: TrainConfig) -> Parts:
    """Build everything that a run needs.

    Raises:
        TrainError: something the user can mend; its message says what.
    """
    accelerator = _accelerator(cfg)
    rank, world = accelerator.process_index, accelerator.num_processes
    cfg = _with_batch_size(cfg, world)
    seed_all(cfg.seed)
    dataset, val_set, names = _datasets(cfg)
    cfg = _with_classes(cfg, names)
    if sharding.is_sharded(accelerator) and isinstance(val_set, IterableDataset):
        raise ConfigError(
            "in shards every process must see as many validation batches, which a stream does not promise: give the "
            "validation set as a folder of images or a table (hfds/), or train without FSDP"
        )

    model = _model(cfg)
    data = resolve_data(model, cfg, cfg.in_chans)
    model = model.to(accelerator.device)
    if cfg.channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    pin = cfg.pin_mem and accelerator.device.type == "cuda"
    loader = train_loader(dataset, cfg, data, rank=rank, world=world, pin=pin)
    batches = int(loader.batches or 0)
    lr = learning_rate(cfg, cfg.batch_size * cfg.grad_accum_steps * world)
    ema = ModelEmaV3(model, decay=cfg.model_ema_decay, use_warmup=cfg.model_ema_warmup) if cfg.model_ema else None
    optimizer = build_optimizer(model, cfg, lr)
    if cfg.torchcompile is not None:
        model.compile(backend=cfg.torchcompile)  # in place: the names in the state dict stay
    if sharding.is_sharded(accelerator):
        sharding.plan(accelerator, model)
    if zero.is_used(accelerator):
        zero.plan(accelerator, model, cfg.batch_size)
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    if sharding.is_sharded(accelerator) and ema is not None:
        ema.module = sharding.shard_like(accelerator, ema.module)
        ema.foreach = False  # shards and whole buffers do not go together
    scheduler, epochs = build_scheduler(optimizer, cfg, batches // cfg.grad_accum_steps)
    return Parts(
        cfg=cfg, accelerator=accelerator, dataset=dataset, names=names, data=data, loader=loader,
        val_loader=val_loader(
            val_set, data, batch_size=cfg.validation_batch_size or cfg.batch_size, workers=cfg.workers,
            rank=rank, world=world, pin=pin, max_bad=cfg.max_bad_images,
        ),
        model=prepared, optimizer=prepared_optimizer, scheduler=scheduler, ema=ema,
        loss=build_loss(cfg).to(accelerator.device), distillation=_distillation(cfg, data, accelerator.device),
        mixup=_mixup(cfg), epochs=epochs, batches=batches, lr=lr,
    )  # fmt: skip


def _accelerator(cfg: TrainConfig) -> Accelerator:
    plugin, zero_plugin = sharding.plugin_from_launch(), zero.plugin_from_launch(cfg)
    if plugin is not None and cfg.clip_grad is not None and cfg.clip_mode != "norm":
        raise ConfigError(f"FSDP clips gradients by their norm alone, clip_mode is {cfg.clip_mode!r}")
    try:
        accelerator = Accelerator(
            mixed_precision="no" if cfg.amp == "none" or zero_plugin is not None else cfg.amp,
            gradient_accumulation_steps=cfg.grad_accum_steps, step_scheduler_with_optimizer=False, fsdp_plugin=plugin,
            deepspeed_plugin=zero_plugin,
        )  # fmt: skip
    except (ValueError, ImportError) as error:
        raise ConfigError(f"amp {cfg.amp!r} cannot run here: {error}") from error
    sharding.shard_on_cpu(accelerator, plugin)
    zero.start(accelerator, zero_plugin, cfg.amp)
    return accelerator


def _with_batch_size(cfg: TrainConfig, world: int) -> TrainConfig:
    """Derive the batch of one forward pass where the global batch is fixed."""
    if cfg.global_batch_size is None:
        return cfg
    batch, rest = divmod(cfg.global_batch_size, world * cfg.grad_accum_steps)
    if rest or batch == 0:
        raise ConfigError(
            f"global_batch_size {cfg.global_batch_size} does not divide over {world} processes x "
            f"{cfg.grad_accum_steps} accumulation steps"
        )
    return dataclasses.replace(cfg, batch_size=batch, global_batch_size=None)


def _datasets(cfg: TrainConfig) -> tuple[Any, Any, tuple[str, ...] | None]:
    """Training set, validation set with the same labels, and class names."""
    common: dict[str, Any] = {
        "in_chans": cfg.in_chans, "input_key": cfg.input_key, "target_key": cfg.target_key,
        "download": cfg.dataset_download, "batch_size": cfg.batch_size, "seed": cfg.seed,
    }  # fmt: skip
    dataset = open_dataset(
        cfg.dataset, cfg.data_dir, cfg.train_split, training=True, class_map=cfg.class_map,
        num_samples=cfg.train_num_samples, **common,
    )  # fmt: skip
    names = class_names(dataset)
    labels: Any = cfg.class_map
    if names is not None and cfg.dataset == "":
        labels = {name: label for label, name in enumerate(names)}  # a class without validation images shifts nothing
    val_set = open_dataset(
        cfg.dataset, cfg.data_dir, cfg.val_split, training=False, class_map=labels,
        num_samples=cfg.val_num_samples, **common,
    )  # fmt: skip
    check_classes(names, val_set, "the validation set", "the training set")
    return dataset, val_set, names


def _with_classes(cfg: TrainConfig, names: tuple[str, ...] | None) -> TrainConfig:
    if cfg.num_classes is None:
        if names is None:
            raise ConfigError("the data set does not tell its classes: give --num-classes")
        return dataclasses.replace(cfg, num_classes=len(names))
    if names is not None and len(names) > cfg.num_classes:
        raise ConfigError(f"the training set has {len(names)} classes, num_classes is {cfg.num_classes}")
    return cfg


def _model(cfg: TrainConfig) -> nn.Module:
    kwargs = {"drop_rate": cfg.drop, "drop_path_rate": cfg.drop_path, **cfg.model_kwargs}
    model = build_model(
        cfg.model, num_classes=cfg.num_classes, in_chans=cfg.in_chans, pretrained=cfg.pretrained, **kwargs
    )
    if cfg.initial_checkpoint is not None:
        load_weights(model, cfg.initial_checkpoint, keep_classifier=cfg.keep_classifier)
    if cfg.fuse and not fuse_report(fuse(model)).replaced:
        raise ConfigError(f"fuse is for timm's MaxViT, DaViT, ConViT and SHViT, and {cfg.model} is none of them")
    if cfg.grad_checkpointing:
        model.set_grad_checkpointing(True)
    if cfg.teacher_model is not None and hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)  # its token's logits beside the others
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if cfg.sync_bn else model


def _distillation(cfg: TrainConfig, data: DataConfig, device: torch.device) -> Distillation | None:
    if cfg.teacher_model is None:
        return None
    teacher = build_model(
        cfg.teacher_model, pretrained=cfg.teacher_path is None, num_classes=cfg.num_classes, in_chans=cfg.in_chans
    )
    if cfg.teacher_path is not None:
        load_weights(teacher, cfg.teacher_path)
    wanted = resolve_model_data_config(teacher, {"in_chans": cfg.in_chans})
    return Distillation(
        teacher, kind=cfg.distillation_type, alpha=cfg.distillation_alpha, tau=cfg.distillation_tau, mean=data.mean,
        std=data.std, teacher_mean=wanted["mean"], teacher_std=wanted["std"],
    ).to(device)  # fmt: skip


def _mixup(cfg: TrainConfig) -> Mixup | None:
    if not cfg.mixing:
        return None
    return Mixup(
        mixup_alpha=cfg.mixup, cutmix_alpha=cfg.cutmix, prob=cfg.mixup_prob, switch_prob=cfg.mixup_switch_prob,
        mode=cfg.mixup_mode, label_smoothing=cfg.smoothing, num_classes=cfg.num_classes,
    )  # fmt: skip
