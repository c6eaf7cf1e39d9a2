"""The training loop.

Everything random in a step follows from the seed, the epoch and the number of the batch, so a run that was stopped
continues from its last saved update as if nothing had happened: on one CPU process the same bits.
"""

from __future__ import annotations

import itertools
import math
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from timm.utils import adaptive_clip_grad
from torch import Tensor
from tqdm import tqdm

import visionattn
from visionattn.train.checkpoint import StateStore, WeightsInfo, save_weights
from visionattn.train.config import TrainConfig
from visionattn.train.data import Batch, name_of
from visionattn.train.errors import DataError, NonFiniteLossError
from visionattn.train.evaluate import Unreadable, evaluate, to_device
from visionattn.train.files import remove_parts, write_atomically
from visionattn.train.report import Report, describe_run, epoch_line, peak_memory
from visionattn.train.resume import Progress, find_run, restore, save_state
from visionattn.train.seeds import seed_all
from visionattn.train.setup import Parts, assemble
from visionattn.train.sharding import average_whole_gradients, is_sharded, local
from visionattn.train.signals import Stopped, StopSignal, TimeLimit


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        folder: the run's folder.
        history: a row for each finished epoch, as in `summary.csv`.
        best: row of the best epoch, or ``None`` before the first.
        stopped_by: the signal that stopped it early, "time limit", or ``None``.
    """

    folder: Path
    history: list[dict[str, Any]]
    best: dict[str, Any] | None
    stopped_by: int | Literal["time limit"] | None


def train(cfg: TrainConfig) -> TrainResult:
    """Train a model as ``cfg`` says; under `accelerate launch` call it in every process.

    Returns:
        How the run ended. After SIGINT or SIGTERM, or before `time_limit` is over, the state is saved and
        ``stopped_by`` says why.

    Raises:
        TrainError: something the user can mend; its message says what.
    """
    with StopSignal() as stop:
        return _Run(assemble(cfg), stop).run()


class _Run:
    """One run: its parts, where it is, and the loop."""

    def __init__(self, parts: Parts, stop: StopSignal) -> None:
        self.parts, self.stop, self.cfg, self.accelerator = parts, stop, parts.cfg, parts.accelerator
        # Several processes agree about stopping now and then only: it makes them wait for each other.
        self.agree_every = 1 if self.accelerator.num_processes == 1 else self.cfg.log_interval
        self.limit = TimeLimit(self.cfg.time_limit, self.agree_every)
        self.folder, state = find_run(parts)
        self.at = restore(parts, state) if state is not None else Progress()
        self.store = StateStore(self.folder / "state")
        if self.accelerator.is_main_process:
            remove_parts(self.folder)
            remove_parts(self.store.folder)
        self.unreadable = Unreadable(self.cfg.max_bad_images, self.at.unreadable)
        self.report = Report(
            self.folder, active=self.accelerator.is_main_process, progress=self.cfg.progress,
            tensorboard=self.cfg.tensorboard, first_update=self.at.update,
        )  # fmt: skip
        # Reading a loss makes the host wait for a GPU, so there it is done now and then.
        self.pending: list[tuple[Tensor, list[int | str]]] = []  # losses not read yet, with the images of their batches
        self.recent: list[int | str] = []  # images of the last batch whose loss was read
        self.check_every = 1 if self.accelerator.device.type == "cpu" else self.cfg.log_interval
        self.report.text("args.yaml", describe_run(self.cfg, self.accelerator.device, self.accelerator.num_processes))
        self.report.line(f"{parts.describe()}; {self.folder}")
        if state is not None:
            self.report.line(f"resumed after update {self.at.update}, {self.at.epoch} epochs are done")

    def run(self) -> TrainResult:
        """Train until the last epoch or a signal."""
        stopped: int | Literal["time limit"] | None = None
        try:
            while self.at.epoch < self.parts.epochs and stopped is None:
                figures = self._train_epoch()
                if figures is not None:
                    self._finish_epoch(figures)
                stopped = self._stopping() if self.at.epoch < self.parts.epochs else None
        except DataError:
            # Nothing is wrong with what was learnt: keep it, where it is the state after an update.
            if self.accelerator.num_processes == 1 and self.at.batch % self.cfg.grad_accum_steps == 0 < self.at.batch:
                self._save_state()
            raise
        finally:
            self.report.close()
        history, name = self.at.history, self.parts.metric
        best = min(history, key=lambda row: self._order(row[name]), default=None)
        if stopped is not None:
            self.report.line(
                f"stopped by {'a signal' if isinstance(stopped, int) else 'the ' + stopped} after update "
                f"{self.at.update}; nothing is lost, continue with --resume {self.folder}"
            )
        elif best is not None:
            self.report.line(f"best {name} {best[name]:.4g} after epoch {best['epoch'] + 1}: {self.folder}")
        return TrainResult(self.folder, history, best, stopped)

    # one epoch

    def _train_epoch(self) -> dict[str, float] | None:
        """Train the rest of the current epoch; ``None`` when it was stopped, with the state saved."""
        at, parts = self.at, self.parts
        parts.model.train()
        parts.optimizer.zero_grad()
        if parts.mixup is not None:
            parts.mixup.mixup_enabled = not 0 < self.cfg.mixup_off_epoch <= at.epoch
        clock = _Clock(self.accelerator.num_processes, self.cfg.workers)
        batches = parts.loader.epoch(at.epoch, at.batch)
        with self.report.bar(f"epoch {at.epoch + 1}/{parts.epochs}", parts.batches, at.batch) as bar:
            for number in itertools.count(at.batch):
                with clock.waiting():
                    batch = next(batches, None)
                if batch is None:
                    break
                for name in self.unreadable.add(batch):
                    self.report.line(f"skipped an unreadable image: {name}")
                self.pending.append((self._step(batch, number), batch.indices))
                clock.count(len(batch.targets), batch.seconds)
                at.batch += 1
                bar.update()
                if not self.accelerator.sync_gradients:
                    continue
                if at.update % self.check_every == 0:
                    self._show(self._check_losses(), clock, bar)
                self.limit.updated()
                due = self.cfg.recovery_interval > 0 and at.update % self.cfg.recovery_interval == 0
                stopping = at.update % self.agree_every == 0 and self._stopping() is not None
                if stopping or (due and at.batch < parts.batches):
                    self._save_state()
                if stopping:
                    return None
        self._check_losses()
        self._sum_losses()
        if at.batch == 0:
            raise DataError("the training set gave no batch: it is shorter than its info file says")
        return {
            "train_loss": at.loss_sum / (at.batch * self.accelerator.num_processes),
            "lr": self._lr(),
            "images_per_second": clock.rate(),
            "input_images_per_second": clock.input_rate(),
            "data_wait": clock.wait(),
            "peak_memory_mb": peak_memory(self.accelerator.device),
            "seconds": clock.seconds(),
        }

    def _step(self, batch: Batch, number: int) -> Tensor:
        """One forward and backward pass, and the update when enough are accumulated; return the loss."""
        cfg, parts, accelerator = self.cfg, self.parts, self.accelerator
        seed_all(cfg.seed, self.at.epoch, number, accelerator.process_index)
        images, targets = to_device(batch, accelerator.device, cfg.channels_last)
        if parts.mixup is not None:
            images, targets = parts.mixup(images, targets)
        with accelerator.accumulate(parts.model):
            with accelerator.autocast():
                outputs = parts.model(images)
                if parts.distillation is not None:
                    loss = parts.distillation(images, outputs, targets, parts.loss)
                else:
                    loss = parts.loss(outputs.float(), targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients and is_sharded(accelerator):
                average_whole_gradients(parts.model)
            if accelerator.sync_gradients and cfg.clip_grad is not None:
                self._clip(cfg.clip_grad)
            parts.optimizer.step()
            parts.optimizer.zero_grad()
        if accelerator.sync_gradients:
            self.at.update += 1
            if parts.ema is not None:
                parts.ema.update(parts.plain_model(), step=self.at.update)
            if parts.scheduler is not None:
                parts.scheduler.step_update(self.at.update)
        return loss.detach()

    def _clip(self, limit: float) -> None:
        parameters = self.parts.model.parameters()
        if self.cfg.clip_mode == "norm":
            self.accelerator.clip_grad_norm_(parameters, limit)
        elif self.cfg.clip_mode == "value":
            self.accelerator.clip_grad_value_(parameters, limit)
        else:
            self.accelerator.unscale_gradients()
            adaptive_clip_grad(parameters, limit)

    def _check_losses(self) -> float:
        """Add the pending losses to the epoch's sum and return the last; stop on one that is not finite."""
        if not self.pending:
            return math.nan
        losses = torch.stack([loss for loss, _ in self.pending]).double().tolist()
        for back, (loss, (_, indices)) in enumerate(zip(losses, self.pending, strict=True)):
            if not math.isfinite(loss):
                self._not_finite(f"the loss became {loss}", self.at.batch - len(losses) + back + 1, indices)
            self.at.loss_sum += loss
        self.recent = self.pending[-1][1]
        self.pending.clear()
        return float(losses[-1])

    def _check_weights(self) -> None:
        """Stop on weights that are not finite, before they are saved: a finite loss may have such gradients."""
        flags = [local(parameter.detach()).isfinite().all() for parameter in self.parts.model.parameters()]
        if not bool(torch.stack(flags).all()):
            self._not_finite("the weights are not finite any more", self.at.batch, self.recent)

    def _not_finite(self, what: str, batch: int, indices: list[int | str]) -> NoReturn:
        """End the run, naming the images of the batch and the last good state."""
        names = [name_of(self.parts.dataset, index) for index in indices]
        listed = self.folder / "non_finite.txt"
        write_atomically(listed, lambda file: file.write(("\n".join(names) + "\n").encode()))
        good = self.store.files()
        raise NonFiniteLossError(
            f"{what} at batch {batch} of epoch {self.at.epoch + 1} (images of the batch: {', '.join(names[:4])}"
            f"{', ...' if len(names) > 4 else ''}, all of them in {listed}); "
            + (f"the last good state is {good[0]}. " if good else "no state was saved yet. ")
            + "Lower the learning rate, clip gradients, or use bf16 in place of fp16"
        )

    def _sum_losses(self) -> None:
        """Bring the sum of losses together from all processes into the first."""
        if self.accelerator.num_processes > 1:
            mine = torch.tensor(self.at.loss_sum, device=self.accelerator.device)
            total = float(self.accelerator.reduce(mine, "sum"))
            self.at.loss_sum = total if self.accelerator.is_main_process else 0.0

    def _stopping(self) -> int | Literal["time limit"] | None:
        """Why to stop, if any process has to; call it in every process."""
        received, late = self.stop.received, self.limit.near()
        if self.accelerator.num_processes > 1:
            mine = torch.tensor([float(received is not None), float(late)], device=self.accelerator.device)
            signals, limits = self.accelerator.reduce(mine, "sum").tolist()
            received = (received or signal.SIGTERM) if signals else None
            late = limits > 0
        return received if received is not None else "time limit" if late else None

    def _stopping_validation(self, number: int) -> bool:
        """Whether to give up a validation before its batch of this number; call it in every process."""
        return number % self.agree_every == 0 and self._stopping() is not None

    def _finish_epoch(self, figures: dict[str, float]) -> None:
        """Evaluate, record and save after an epoch; give it up, with the state saved, when the run must stop."""
        at, parts = self.at, self.parts
        self._check_weights()
        started = time.perf_counter()
        row: dict[str, Any] = {"epoch": at.epoch, "train_loss": figures["train_loss"]}
        models = {"eval": parts.plain_model()}
        if parts.ema is not None:
            models["eval_ema"] = parts.ema.module
        for prefix, model in models.items():
            try:
                result = evaluate(
                    model, parts.val_loader, self.accelerator, unreadable=self.unreadable,
                    channels_last=self.cfg.channels_last, progress=self.cfg.progress, stop=self._stopping_validation,
                )  # fmt: skip
            except Stopped:
                self._save_state()  # all updates of the epoch are in it, and the validation comes again
                return
            row |= {f"{prefix}_{name}": result[name] for name in ("loss", "top1", "top5")}
        row |= figures
        row["seconds"] += time.perf_counter() - started
        at.history.append(row)
        at.epoch, at.batch, at.loss_sum = at.epoch + 1, 0, 0.0
        if parts.scheduler is not None:
            parts.scheduler.step(at.epoch, row[parts.metric])
        self._save_weights(row)
        self._save_state()
        self.report.epoch(at.history, at.update, self.unreadable.names)
        self.report.line(epoch_line(row, parts.epochs))

    # what is shown and saved

    def _show(self, loss: float, clock: _Clock, bar: tqdm[Any]) -> None:
        """Show the state of the epoch in its bar, and now and then on a line and in the event files."""
        at, cfg = self.at, self.cfg
        rate, lr = clock.rate(), self._lr()
        text = (
            f"loss {loss:.4f}  lr {lr:.2e}  {rate:.0f} img/s (input {clock.input_rate():.0f})  "
            f"data wait {100 * clock.wait():.0f} %"
        )
        bar.set_postfix_str(text)
        if at.update % cfg.log_interval == 0:
            rates = {"train/images_per_second": rate, "train/input_images_per_second": clock.input_rate()}
            self.report.scalars({"train/loss": loss, "train/lr": lr, **rates}, at.update)
            if cfg.progress and not self.report.bars:
                self.report.line(f"  epoch {at.epoch + 1}  batch {at.batch}/{self.parts.batches}  {text}")

    def _save_state(self) -> None:
        started = time.monotonic()
        self._check_losses()
        self._check_weights()
        self._sum_losses()
        self.at.unreadable = list(self.unreadable.names)
        save_state(self.parts, self.at, self.store)
        self.limit.saved(time.monotonic() - started)

    def _save_weights(self, row: dict[str, Any]) -> None:
        """Write `last`, and `model_best` and `checkpoint-N` where this epoch deserves it."""
        metric, ema, folder = self.parts.metric, self.parts.ema, self.folder
        # In all processes: it may gather shards.
        raw = self.accelerator.get_state_dict(self.parts.model)
        averaged = self.accelerator.get_state_dict(ema.module) if ema is not None else {}
        if not self.accelerator.is_main_process:
            return
        save_weights(folder / "last.safetensors", raw, self._info(row, "raw"))
        weights, kind = raw, "raw"
        if ema is not None:
            save_weights(folder / "last_ema.safetensors", averaged, self._info(row, "ema"))
            if metric.startswith("eval_ema"):
                weights, kind = averaged, "ema"
        entry = {"epoch": row["epoch"], "metric": row[metric]}
        ranked = sorted([*self.at.kept, entry], key=lambda item: self._order(item["metric"]))  # the earlier of equals
        self.at.kept, dropped = ranked[: self.cfg.checkpoint_hist], ranked[self.cfg.checkpoint_hist :]
        if entry in self.at.kept:
            save_weights(folder / f"checkpoint-{row['epoch']}.safetensors", weights, self._info(row, kind))
        if entry is self.at.kept[0]:
            save_weights(folder / "model_best.safetensors", weights, self._info(row, kind))
        for old in dropped:
            (folder / f"checkpoint-{old['epoch']}.safetensors").unlink(missing_ok=True)

    def _info(self, row: dict[str, Any], kind: str) -> WeightsInfo:
        prefix = "eval_ema_" if kind == "ema" else "eval_"
        cfg, names = self.cfg, self.parts.names
        data: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in self.parts.data._asdict().items()}
        return WeightsInfo(
            model=cfg.model, model_kwargs=cfg.model_kwargs, num_classes=int(cfg.num_classes or 0),
            in_chans=cfg.in_chans, class_names=list(names) if names else None, dataset=cfg.dataset,
            val_split=cfg.val_split, weights=kind, epoch=row["epoch"],
            metrics={name: row[prefix + name] for name in ("loss", "top1", "top5")},
            version=visionattn.__version__, **data,
        )  # fmt: skip

    def _order(self, metric: float) -> float:
        """Sort key: the best metric first."""
        return metric if self.cfg.eval_metric == "loss" else -metric

    def _lr(self) -> float:
        return max(float(group["lr"]) for group in self.parts.optimizer.param_groups)


class _Clock:
    """Time of an epoch, the part of it spent waiting for data, and what the loading processes could deliver.

    Args:
        processes: of the training.
        workers: loading processes of each; with 0 the training process loads itself.
    """

    def __init__(self, processes: int, workers: int) -> None:
        self._processes, self._workers = processes, max(1, workers)
        self._images, self._loading = 0, 0.0  # of this process; seconds of loading, summed over its loading processes
        self._waited, self._started, self._since = 0.0, time.perf_counter(), 0.0

    def count(self, images: int, loading: float) -> None:
        """Note a batch, and the seconds that one loading process took to make it."""
        self._images += images
        self._loading += loading

    def waiting(self) -> _Clock:
        return self

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._waited += time.perf_counter() - self._since

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def rate(self) -> float:
        """Images a second, over all processes."""
        return self._images * self._processes / self.seconds()

    def input_rate(self) -> float:
        """Images a second that the loading processes could deliver if nothing held them up, over all processes."""
        return self._images * self._workers * self._processes / self._loading if self._loading else 0.0

    def wait(self) -> float:
        """Share of the time spent waiting, from 0 to 1."""
        return self._waited / self.seconds()
