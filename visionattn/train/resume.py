"""The state of a run between two updates: saved, found again, restored."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from visionattn.train import sharding, zero
from visionattn.train.checkpoint import StateStore, read_state
from visionattn.train.errors import CheckpointError, ConfigError
from visionattn.train.setup import Parts
from visionattn.train.streams import StreamSamples

# What may differ between a run and its continuation without changing what it computes.
_FREE = {
    "resume", "overwrite", "output", "experiment", "workers", "pin_mem", "log_interval", "recovery_interval",
    "time_limit", "progress", "tensorboard", "data_dir", "checkpoint_hist", "max_bad_images", "initial_checkpoint",
    "pretrained", "keep_classifier", "dry_run", "dataset_download", "validation_batch_size",
}  # fmt: skip
# What must not differ in the middle of an epoch.
_SHAPE = {"batch_size", "grad_accum_steps", "seed", "dataset", "train_split", "aug_repeats", "processes", "workers"}
# What an optimiser's groups take from the configuration rather than from a state whose configuration differed.
_HYPER = {"lr", "initial_lr", "lr_scale", "weight_decay", "betas", "eps", "momentum"}


@dataclass
class Progress:
    """Where a run is; together with the tensors this is its state."""

    epoch: int = 0  # epochs finished
    batch: int = 0  # batches of the current epoch done
    update: int = 0  # optimiser steps done, over all epochs
    loss_sum: float = 0.0  # of the current epoch's batches, over all processes
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # the rows of summary.csv
    kept: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # epoch and metric of each kept checkpoint
    unreadable: list[str] = dataclasses.field(default_factory=list)  # image files


def save_state(parts: Parts, at: Progress, store: StateStore) -> None:
    """Save everything from which the run continues; call it in every process.

    Raises:
        CheckpointError: the state could not be written; earlier ones are still there.
    """
    at.unreadable = sorted(set(gather_object(at.unreadable)))
    cut = zero.is_used(parts.accelerator)
    sharded = sharding.is_sharded(parts.accelerator) or cut
    if not sharded and not parts.accelerator.is_main_process:
        return
    scaler = parts.accelerator.scaler
    state = {
        **dataclasses.asdict(at),
        "config": _plain(parts),
        "model": parts.plain_model().state_dict(),
        "ema": parts.ema.module.state_dict() if parts.ema is not None else None,
        "optimizer": parts.optimizer.state_dict() if not cut else {},
        "scheduler": parts.scheduler.state_dict() if parts.scheduler is not None else None,
        "scaler": scaler.state_dict() if scaler is not None else None,
    }
    if sharded:
        own = zero.optimizer_state(parts.optimizer) if cut else None
        sharding.save_shards(store.path(at.update), state, parts.accelerator, own)
        if parts.accelerator.is_main_process:
            store.prune()
    else:
        store.save(state, at.update)


def find_run(parts: Parts) -> tuple[Path, dict[str, Any] | None]:
    """Return the run's folder, and the state to continue from where `resume` asks for it.

    Raises:
        ConfigError: the folder holds a run already and the configuration says nothing about it.
        CheckpointError: there is nothing to resume, or nothing readable.
    """
    cfg, report = parts.cfg, parts.accelerator.print
    name = f"{datetime.now().strftime('%Y%m%d-%H%M%S')}-{cfg.model.replace('/', '_')}-{parts.data.input_size[-1]}"
    folder = Path(cfg.output) / (cfg.experiment or name)
    if cfg.resume == "auto":
        if cfg.experiment is None:
            raise ConfigError("--resume continues the run of --experiment NAME: name it, or give --resume FOLDER")
        return folder, StateStore(folder / "state").newest(report)
    if cfg.resume is not None:
        source = Path(cfg.resume)
        if source.is_file() or source.parent.name == "state":
            return folder if cfg.experiment else source.parent.parent, read_state(source)
        state = StateStore(source / "state").newest(report)
        if state is None:
            raise CheckpointError(f"nothing to resume: {source} holds no state/update-*.pt")
        return folder if cfg.experiment else source, state
    used = (folder / "args.yaml").exists() or (folder / "state").exists()
    if used and not cfg.overwrite:
        raise ConfigError(
            f"{folder} holds a run already: continue it with --resume, start anew with --overwrite, "
            "or choose another --experiment"
        )
    parts.accelerator.wait_for_everyone()  # all have looked before one writes
    if used and parts.accelerator.is_main_process:
        _clear(folder)
    return folder, None


def restore(parts: Parts, state: dict[str, Any]) -> Progress:
    """Put a state into a run's parts.

    Raises:
        ConfigError: the configuration differs in what must not change now.
        CheckpointError: the state belongs to another model.
    """
    mine, theirs = _plain(parts), state["config"]
    changed = [key for key in mine if key not in _FREE and mine[key] != theirs.get(key)]
    if isinstance(parts.loader.samples, StreamSamples) and max(mine["workers"], 1) != max(theirs["workers"], 1):
        changed.append("workers")  # these decide who reads which shard
    said = ", ".join(f"{key} {theirs.get(key)} -> {mine[key]}" for key in changed)
    if state["batch"] and _SHAPE & set(changed):
        raise ConfigError(f"the state is in the middle of an epoch, so this cannot change now: {said}")
    if (state["ema"] is None) != (parts.ema is None):
        raise ConfigError("model_ema must stay as it was in the run that is resumed")
    if changed:
        parts.accelerator.print(f"the resumed run differs from the one that was saved: {said}")
        for optimizer in [part["base_optimizer_state"] for part in state.get("own", [])] or [state["optimizer"]]:
            for saved, group in zip(optimizer["param_groups"], parts.optimizer.param_groups, strict=False):
                saved.update({key: value for key, value in group.items() if key in _HYPER})
    try:
        sharding.load_model(parts.plain_model(), state["model"])
        if zero.is_used(parts.accelerator):
            zero.load_optimizer(parts.accelerator, parts.optimizer, state.get("own"))
        elif "own" in state:
            raise CheckpointError("the state was saved under DeepSpeed: continue it as it was launched")
        else:
            sharding.load_optimizer(parts.optimizer, state["optimizer"])
        if parts.ema is not None:
            sharding.load_model(parts.ema.module, state["ema"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"the state belongs to another model ({theirs['model']}): {error}") from error
    at = Progress(**{field.name: state[field.name] for field in dataclasses.fields(Progress)})
    if parts.scheduler is not None:
        if changed:
            parts.scheduler.step(at.epoch)
            parts.scheduler.step_update(at.update)
        else:
            parts.scheduler.load_state_dict(state["scheduler"])
    if parts.accelerator.scaler is not None and state["scaler"] is not None:
        parts.accelerator.scaler.load_state_dict(state["scaler"])
    if not parts.accelerator.is_main_process:
        at.loss_sum = 0.0  # the sum over all processes is the first one's
    return at


def _plain(parts: Parts) -> dict[str, Any]:
    """The configuration as plain values that a state file may hold."""
    values = dataclasses.asdict(parts.cfg).items()
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values}
    return {**plain, "processes": parts.accelerator.num_processes}


def _clear(folder: Path) -> None:
    """Remove what an earlier run of the same name left, and nothing else."""
    for pattern in ("*.safetensors", "summary.csv", "unreadable.txt", "args.yaml"):
        for file in folder.glob(pattern):
            file.unlink()
    for name in ("state", "tb"):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
