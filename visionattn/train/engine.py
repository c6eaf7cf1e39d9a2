"""The training loop.

Everything random in a step follows from the seed, the epoch and the number of the batch, so a run that was stopped
continues from its last saved update as if nothing had happened: on one CPU process the same bits.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.data import Mixup
from timm.utils import ModelEmaV3, adaptive_clip_grad
from torch import Tensor, nn

import visionattn
from visionattn.train.build import (
    build_loss,
    build_model,
    build_optimizer,
    build_scheduler,
    learning_rate,
    resolve_data,
)
from visionattn.train.checkpoint import StateStore, WeightsInfo, load_weights, read_state, save_weights
from visionattn.train.config import TrainConfig
from visionattn.train.data import (
    DataConfig,
    check_classes,
    class_names,
    name_of,
    open_dataset,
    seed_all,
    train_loader,
    val_loader,
)
from visionattn.train.errors import CheckpointError, ConfigError, NonFiniteLossError
from visionattn.train.evaluate import Unreadable, evaluate, to_device
from visionattn.train.report import Report, describe_run, epoch_line
from visionattn.train.signals import StopSignal

# What may differ between a run and its continuation without changing what it computes.
_FREE = {
    "resume", "overwrite", "output", "experiment", "workers", "pin_mem", "log_interval", "progress", "tensorboard",
    "data_dir", "checkpoint_hist", "max_bad_images", "initial_checkpoint", "pretrained", "dataset_download",
    "validation_batch_size",
}  # fmt: skip
# What must not differ in the middle of an epoch.
_SHAPE = ("batch_size", "grad_accum_steps", "seed", "dataset", "train_split", "aug_repeats", "processes")


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        folder: the run's folder.
        history: a row for each finished epoch, as in `summary.csv`.
        best: row of the best epoch, or ``None`` before the first.
        stopped_by: the signal that stopped it early, or ``None``.
    """

    folder: Path
    history: list[dict[str, Any]]
    best: dict[str, Any] | None
    stopped_by: int | None


@dataclass
class Progress:
    """Where a run is; together with the tensors this is its state."""

    epoch: int = 0  # epochs finished
    batch: int = 0  # batches of the current epoch done
    update: int = 0  # optimiser steps done, over all epochs
    loss_sum: float = 0.0  # of the current epoch's batches, over all processes
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    kept: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # epoch and metric of each kept checkpoint
    unreadable: list[str] = dataclasses.field(default_factory=list)


def train(cfg: TrainConfig) -> TrainResult:
    """Train a model as ``cfg`` says; under `accelerate launch` call it in every process.

    Returns:
        How the run ended. After SIGINT or SIGTERM the state is saved and ``stopped_by`` names the signal.

    Raises:
        TrainError: something the user can mend; its message says what.
    """
    accelerator = _accelerator(cfg)
    cfg = _with_batch_size(cfg, accelerator.num_processes)
    with StopSignal() as stop:
        return _Run(cfg, accelerator).run(stop)


class _Run:
    """One run: what `train` builds, and the loop over it."""

    def __init__(self, cfg: TrainConfig, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        seed_all(cfg.seed)
        self.dataset = _open(cfg, training=True, class_map=cfg.class_map)
        self.names = class_names(self.dataset)
        if cfg.num_classes is None:
            if self.names is None:
                raise ConfigError("the data set does not tell its classes: give --num-classes")
            cfg = dataclasses.replace(cfg, num_classes=len(self.names))
        elif self.names is not None and len(self.names) > cfg.num_classes:
            raise ConfigError(f"the training set has {len(self.names)} classes, num_classes is {cfg.num_classes}")
        folder_map = {name: label for label, name in enumerate(self.names)} if self.names and not cfg.dataset else None
        val_set = _open(cfg, training=False, class_map=folder_map or cfg.class_map)
        check_classes(self.names, val_set, "the validation set", "the training set")
        self.cfg = cfg

        model = build_model(
            cfg.model, num_classes=cfg.num_classes, in_chans=cfg.in_chans, pretrained=cfg.pretrained,
            drop_rate=cfg.drop, drop_path_rate=cfg.drop_path, **cfg.model_kwargs,
        )  # fmt: skip
        if cfg.initial_checkpoint is not None:
            load_weights(model, cfg.initial_checkpoint, keep_classifier=cfg.keep_classifier)
        self.data = resolve_data(model, cfg, cfg.in_chans)
        if cfg.grad_checkpointing:
            model.set_grad_checkpointing(True)
        if cfg.sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = model.to(accelerator.device)
        if cfg.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

        self.loader = train_loader(
            self.dataset, cfg, self.data, rank=rank, world=world, pin=cfg.pin_mem and torch.cuda.is_available()
        )
        self.val_loader = val_loader(
            val_set, self.data, batch_size=cfg.validation_batch_size or cfg.batch_size, workers=cfg.workers,
            rank=rank, world=world, pin=cfg.pin_mem and torch.cuda.is_available(), max_bad=cfg.max_bad_images,
        )  # fmt: skip
        self.batches = int(self.loader.batches or 0)
        self.global_batch = cfg.batch_size * cfg.grad_accum_steps * world
        lr = learning_rate(cfg, self.global_batch)
        self.ema = (
            ModelEmaV3(model, decay=cfg.model_ema_decay, use_warmup=cfg.model_ema_warmup) if cfg.model_ema else None
        )
        optimizer = build_optimizer(model, cfg, lr)
        if cfg.torchcompile is not None:
            model.compile(backend=cfg.torchcompile)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.scheduler, self.epochs = build_scheduler(optimizer, cfg, self.batches // cfg.grad_accum_steps)
        self.loss = build_loss(cfg).to(accelerator.device)
        self.mixup = Mixup(
            mixup_alpha=cfg.mixup, cutmix_alpha=cfg.cutmix, prob=cfg.mixup_prob, switch_prob=cfg.mixup_switch_prob,
            mode=cfg.mixup_mode, label_smoothing=cfg.smoothing, num_classes=cfg.num_classes,
        ) if cfg.mixing else None  # fmt: skip

        self.folder, state = self._folder_and_state()
        self.store = StateStore(self.folder / "state")
        self.progress = Progress()
        if state is not None:
            self._restore(state)
        self.unreadable = Unreadable(cfg.max_bad_images, self.progress.unreadable)
        self.report = Report(
            self.folder, active=accelerator.is_main_process, progress=cfg.progress, tensorboard=cfg.tensorboard,
            first_update=self.progress.update,
        )  # fmt: skip
        self.report.text("args.yaml", describe_run(cfg, accelerator.device, world))
        parameters = sum(p.numel() for p in model.parameters())
        self.report.line(
            f"{cfg.model}: {parameters / 1e6:.2f} M parameters, {cfg.num_classes} classes, input "
            f"{'x'.join(map(str, self.data.input_size))}; {len(self.dataset)} training images, global batch "
            f"{self.global_batch}, {self.batches // cfg.grad_accum_steps} updates an epoch, lr {lr:.3g}; "
            f"{world} x {accelerator.device.type}; {self.folder}"
        )
        if state is not None:
            self.report.line(f"resumed after update {self.progress.update} (epoch {self.progress.epoch + 1})")

    # the loop

    def run(self, stop: StopSignal) -> TrainResult:
        """Train until the last epoch or a signal."""
        started_at = self.progress.update
        try:
            while self.progress.epoch < self.epochs:
                figures = self._train_epoch(stop)
                if figures is None:
                    self._save_state()
                    self.report.line(
                        f"stopped by signal {stop.received} after update {self.progress.update}; nothing is lost, "
                        f"continue with: --resume {self.folder}"
                    )
                    break
                self._finish_epoch(figures)
            else:
                if self.progress.update == started_at:
                    self.report.line(f"nothing to do: {self.epochs} epochs are done")
        finally:
            self.report.close()
        history = self.progress.history
        best = self._best(history)
        if best is not None and stop.received is None:
            name = self._metric_name()
            self.report.line(f"best {name} {best[name]:.4g} after epoch {best['epoch'] + 1}: {self.folder}")
        return TrainResult(self.folder, history, best, stop.received if self.progress.epoch < self.epochs else None)

    def _train_epoch(self, stop: StopSignal) -> dict[str, float] | None:
        """Train the rest of the current epoch; ``None`` when a signal stopped it at an update."""
        cfg, at, accelerator = self.cfg, self.progress, self.accelerator
        self.model.train()
        self.optimizer.zero_grad()
        if self.mixup is not None:
            self.mixup.mixup_enabled = not 0 < cfg.mixup_off_epoch <= at.epoch
        check_every = 1 if accelerator.device.type == "cpu" else cfg.log_interval  # reading a loss waits for the GPU
        pending: list[tuple[Tensor, list[int]]] = []
        started, waited, images_done, first = time.perf_counter(), 0.0, 0, at.batch
        lr, shown = self._lr(), math.nan
        with self.report.bar(f"epoch {at.epoch + 1}/{self.epochs}", self.batches, at.batch) as bar:
            batches = self.loader.epoch(at.epoch, at.batch)
            for number in itertools.count(at.batch):
                before = time.perf_counter()
                batch = next(batches, None)
                waited += time.perf_counter() - before
                if batch is None:
                    break
                for name in self.unreadable.add(batch):
                    self.report.line(f"skipped an unreadable image: {name}")
                pending.append((self._step(batch, number), batch.indices))
                images_done += len(batch.targets) * accelerator.num_processes
                bar.update()
                at.batch += 1
                if not accelerator.sync_gradients:
                    continue
                if at.update % check_every == 0:
                    shown = self._check_losses(pending)
                    lr, rate = self._lr(), images_done / (time.perf_counter() - started)
                    wait = waited / (time.perf_counter() - started)
                    bar.set_postfix_str(f"loss {shown:.4f} lr {lr:.2e} {rate:.0f} img/s wait {100 * wait:.0f} %")
                    if at.update % cfg.log_interval == 0:
                        self.report.scalars({"train/loss": shown, "train/lr": lr, "train/img_per_s": rate}, at.update)
                        if cfg.progress and not self.report.bars and self.batches > cfg.log_interval:
                            self.report.line(
                                f"  epoch {at.epoch + 1} batch {at.batch}/{self.batches}  loss {shown:.4f}  "
                                f"lr {lr:.2e}  {rate:.0f} img/s  data wait {100 * wait:.0f} %"
                            )
                if at.batch < self.batches and self._stopping(stop):
                    self._check_losses(pending)
                    self._sum_losses()
                    return None
        self._check_losses(pending)
        self._sum_losses()
        seconds = time.perf_counter() - started
        if at.batch == first:
            raise ConfigError("the data loader gave no batch: the stream is shorter than its info file says")
        return {
            "train_loss": at.loss_sum / (at.batch * accelerator.num_processes),
            "lr": lr,
            "images_per_second": images_done / seconds,
            "data_wait": waited / seconds,
        }

    def _step(self, batch: Any, number: int) -> Tensor:
        """One forward and backward pass, and the update when enough are accumulated; return the loss."""
        cfg, accelerator = self.cfg, self.accelerator
        seed_all(cfg.seed, self.progress.epoch, number, accelerator.process_index)
        images, targets = to_device(batch, accelerator.device, cfg.channels_last)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        with accelerator.accumulate(self.model):
            loss = self.loss(self.model(images), targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients and cfg.clip_grad is not None:
                self._clip(cfg.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if accelerator.sync_gradients:
            self.progress.update += 1
            if self.ema is not None:
                self.ema.update(accelerator.unwrap_model(self.model), step=self.progress.update)
            if self.scheduler is not None:
                self.scheduler.step_update(self.progress.update)
        return loss.detach()

    def _clip(self, limit: float) -> None:
        if self.cfg.clip_mode == "norm":
            self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        elif self.cfg.clip_mode == "value":
            self.accelerator.clip_grad_value_(self.model.parameters(), limit)
        else:
            self.accelerator.unscale_gradients()
            adaptive_clip_grad(self.model.parameters(), limit)

    def _check_losses(self, pending: list[tuple[Tensor, list[int]]]) -> float:
        """Add the pending losses to the epoch's sum and return the last; stop on one that is not finite."""
        if not pending:
            return math.nan
        losses = torch.stack([loss for loss, _ in pending]).double().tolist()
        for back, (loss, (_, indices)) in enumerate(zip(losses, pending, strict=True)):
            if not math.isfinite(loss):
                names = ", ".join(name_of(self.dataset, index) for index in indices[:4])
                raise NonFiniteLossError(
                    f"the loss became {loss} at batch {self.progress.batch - len(losses) + back + 1} of epoch "
                    f"{self.progress.epoch + 1} (its first images: {names}); the last good state is in "
                    f"{self.store.folder}. Lower the learning rate, clip gradients, or use bf16 in place of fp16"
                )
            self.progress.loss_sum += loss
        pending.clear()
        return losses[-1]

    def _sum_losses(self) -> None:
        """Bring the sum of losses together from all processes into the first."""
        if self.accelerator.num_processes > 1:
            mine = torch.tensor(self.progress.loss_sum, device=self.accelerator.device)
            total = float(self.accelerator.reduce(mine, "sum"))
            self.progress.loss_sum = total if self.accelerator.is_main_process else 0.0

    def _stopping(self, stop: StopSignal) -> bool:
        """Whether any process got a signal; several processes agree at every `log_interval`-th update."""
        if self.accelerator.num_processes == 1:
            return stop.received is not None
        if self.progress.update % self.cfg.log_interval:
            return False
        flag = torch.tensor(float(stop.received is not None), device=self.accelerator.device)
        return float(self.accelerator.reduce(flag, "sum")) > 0

    def _finish_epoch(self, figures: dict[str, float]) -> None:
        """Evaluate, record and save after an epoch."""
        cfg, at = self.cfg, self.progress
        started = time.perf_counter()
        row: dict[str, Any] = {"epoch": at.epoch, "train_loss": figures.pop("train_loss")}
        models = {"eval": self.accelerator.unwrap_model(self.model)}
        if self.ema is not None:
            models["eval_ema"] = self.ema.module
        for prefix, model in models.items():
            result = evaluate(
                model, self.val_loader, self.accelerator, unreadable=self.unreadable,
                channels_last=cfg.channels_last, progress=cfg.progress,
            )  # fmt: skip
            row |= {f"{prefix}_{name}": result[name] for name in ("loss", "top1", "top5")}
        row |= figures
        row["seconds"] = self.global_batch * self.batches / cfg.grad_accum_steps / figures["images_per_second"]
        row["seconds"] += time.perf_counter() - started
        at.history.append(row)
        at.epoch, at.batch, at.loss_sum = at.epoch + 1, 0, 0.0
        if self.scheduler is not None:
            self.scheduler.step(at.epoch, row[self._metric_name()])
        self._save_weights(row)
        self._save_state()
        self.report.summary(at.history)
        self.report.scalars({k.replace("_", "/", 1): v for k, v in row.items() if k.startswith("eval")}, at.update)
        self.report.scalars({"train/epoch_loss": row["train_loss"]}, at.update)
        self.report.line(epoch_line(row, self.epochs))
        names = sorted(set(gather_object(list(self.unreadable.names))))
        if names:
            self.report.line(f"{len(names)} unreadable images so far, listed in {self.folder / 'unreadable.txt'}")
            self.report.text("unreadable.txt", "\n".join(names) + "\n")

    # saving and resuming

    def _save_weights(self, row: dict[str, Any]) -> None:
        """Write `last`, and `model_best` and `checkpoint-N` where this epoch deserves it."""
        raw = self.accelerator.get_state_dict(self.model)  # all processes: it may gather shards
        if not self.accelerator.is_main_process:
            return
        averaged = self.ema.module.state_dict() if self.ema is not None else None
        save_weights(self.folder / "last.safetensors", raw, self._info(row, "raw"))
        if averaged is not None:
            save_weights(self.folder / "last_ema.safetensors", averaged, self._info(row, "ema"))
        kind = "ema" if self._metric_name().startswith("eval_ema") else "raw"
        weights = averaged if kind == "ema" and averaged is not None else raw
        entry = {"epoch": row["epoch"], "metric": row[self._metric_name()]}
        ranked = sorted([*self.progress.kept, entry], key=self._rank)
        kept, dropped = ranked[: self.cfg.checkpoint_hist], ranked[self.cfg.checkpoint_hist :]
        if entry in kept:
            save_weights(self.folder / f"checkpoint-{row['epoch']}.safetensors", weights, self._info(row, kind))
        if entry is kept[0]:
            save_weights(self.folder / "model_best.safetensors", weights, self._info(row, kind))
        for old in dropped:
            (self.folder / f"checkpoint-{old['epoch']}.safetensors").unlink(missing_ok=True)
        self.progress.kept = kept

    def _save_state(self) -> None:
        model = self.accelerator.get_state_dict(self.model)
        self.progress.unreadable = sorted(set(gather_object(list(self.unreadable.names))))
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            **dataclasses.asdict(self.progress),
            "config": _plain(self.cfg, self.accelerator.num_processes),
            "model": model,
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "scaler": scaler.state_dict() if scaler is not None else None,
        }
        self.store.save(state, self.progress.update)

    def _folder_and_state(self) -> tuple[Path, dict[str, Any] | None]:
        """The run's folder, and the state to continue from."""
        cfg = self.cfg
        when = datetime.now().strftime("%Y%m%d-%H%M%S")
        default = f"{when}-{cfg.model.replace('/', '_')}-{self.data.input_size[-1]}"
        folder = Path(cfg.output) / (cfg.experiment or default)
        if cfg.resume == "auto":
            if cfg.experiment is None:
                raise ConfigError("--resume continues the run of --experiment NAME: name it, or give --resume FOLDER")
            return folder, StateStore(folder / "state").newest(self.accelerator.print)
        if cfg.resume is not None:
            source = Path(cfg.resume)
            if source.is_file():
                return folder if cfg.experiment else source.parent.parent, read_state(source)
            state = StateStore(source / "state").newest(self.accelerator.print)
            if state is None:
                raise CheckpointError(f"nothing to resume: {source} holds no state/update-*.pt")
            return folder if cfg.experiment else source, state
        if (folder / "args.yaml").exists() or (folder / "state").exists():
            if not cfg.overwrite:
                raise ConfigError(
                    f"{folder} holds a run already: continue it with --resume, start anew with --overwrite, "
                    "or choose another --experiment"
                )
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                _clear(folder)
        self.accelerator.wait_for_everyone()
        return folder, None

    def _restore(self, state: dict[str, Any]) -> None:
        mine, theirs = _plain(self.cfg, self.accelerator.num_processes), state["config"]
        changed = [key for key in mine if key not in _FREE and mine[key] != theirs.get(key)]
        said = ", ".join(f"{key} {theirs.get(key)} -> {mine[key]}" for key in changed)
        if state["batch"] and any(key in _SHAPE for key in changed):
            raise ConfigError(f"the state is in the middle of an epoch, so this cannot change now: {said}")
        if changed:
            self.accelerator.print(f"the resumed run differs from the one that was saved: {said}")
        if (state["ema"] is None) != (self.ema is None):
            raise ConfigError("model_ema must stay as it was in the run that is resumed")
        try:
            self.accelerator.unwrap_model(self.model).load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"the state belongs to another model ({theirs['model']}): {error}") from error
        if self.scheduler is not None and state["scheduler"] is not None and not changed:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**{field.name: state[field.name] for field in dataclasses.fields(Progress)})
        if not self.accelerator.is_main_process:
            self.progress.loss_sum = 0.0

    # small things

    def _info(self, row: dict[str, Any], kind: str) -> WeightsInfo:
        prefix = "eval_ema_" if kind == "ema" else "eval_"
        cfg, data = self.cfg, self.data
        return WeightsInfo(
            model=cfg.model, model_kwargs=cfg.model_kwargs, num_classes=int(cfg.num_classes or 0),
            in_chans=cfg.in_chans, class_names=list(self.names) if self.names else None,
            dataset=cfg.dataset, val_split=cfg.val_split, weights=kind, epoch=row["epoch"],
            metrics={name: row[prefix + name] for name in ("loss", "top1", "top5")},
            version=visionattn.__version__, **_listed(data),
        )  # fmt: skip

    def _metric_name(self) -> str:
        averaged = self.ema is not None and self.cfg.best_weights != "raw"
        return f"{'eval_ema' if averaged else 'eval'}_{self.cfg.eval_metric}"

    def _rank(self, entry: dict[str, Any]) -> float:
        """Sort key of a kept checkpoint, the best first and the earlier one among equals."""
        sign = 1.0 if self.cfg.eval_metric == "loss" else -1.0
        return sign * entry["metric"]

    def _best(self, history: list[dict[str, Any]]) -> dict[str, Any] | None:
        name = self._metric_name()
        return min(history, key=lambda row: self._rank({"metric": row[name]}), default=None)

    def _lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)


def _accelerator(cfg: TrainConfig) -> Accelerator:
    try:
        return Accelerator(
            mixed_precision="no" if cfg.amp == "none" else cfg.amp, gradient_accumulation_steps=cfg.grad_accum_steps,
            step_scheduler_with_optimizer=False,
        )  # fmt: skip
    except (ValueError, ImportError) as error:
        raise ConfigError(f"amp {cfg.amp!r} cannot run here: {error}") from error


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


def _open(cfg: TrainConfig, *, training: bool, class_map: str | dict[str, int] | None) -> Any:
    return open_dataset(
        cfg.dataset, cfg.data_dir, cfg.train_split if training else cfg.val_split, training=training,
        in_chans=cfg.in_chans, class_map=class_map, input_key=cfg.input_key, target_key=cfg.target_key,
        num_samples=cfg.train_num_samples if training else cfg.val_num_samples,
        download=cfg.dataset_download, batch_size=cfg.batch_size, seed=cfg.seed,
    )  # fmt: skip


def _plain(cfg: TrainConfig, world: int) -> dict[str, Any]:
    values = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(cfg).items()}
    return {**values, "processes": world}


def _listed(data: DataConfig) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in data._asdict().items()}


def _clear(folder: Path) -> None:
    """Remove what an earlier run of the same name left, and nothing else."""
    StateStore(folder / "state").clear()
    for pattern in ("*.safetensors", "summary.csv", "unreadable.txt", "tb/events.*", "args.yaml"):
        for file in folder.glob(pattern):
            file.unlink()
