"""What a run would do, without doing it: `tools/train.py ... --dry-run`."""

from __future__ import annotations

from typing import Any

from torch.utils.data import IterableDataset

from visionattn.train import zero
from visionattn.train.cli import to_yaml
from visionattn.train.config import TrainConfig
from visionattn.train.cost import count_macs, measure_memory
from visionattn.train.data import NO_LABEL, Loader
from visionattn.train.errors import ConfigError, DataError
from visionattn.train.evaluate import Unreadable
from visionattn.train.setup import Parts, assemble
from visionattn.train.sharding import is_sharded

_LOOKED_AT = 32  # images of each split that are read


def dry_run(cfg: TrainConfig) -> str:
    """Build everything that a run needs, try one update on two made-up images, read some of the data; write nothing.

    Returns:
        The resolved recipe as YAML, and below it parameters, multiply-adds, updates, memory and what is in the data.

    Raises:
        TrainError: the run would not begin; the message says why.
    """
    parts = assemble(cfg)
    if is_sharded(parts.accelerator) or zero.is_used(parts.accelerator):
        raise ConfigError(
            "--dry-run looks at one process: leave FSDP and DeepSpeed out, their memory follows from what is printed"
        )
    data = [_look(parts, "training", parts.dataset, parts.loader), _look(parts, "validation", None, parts.val_loader)]
    return to_yaml(parts.cfg) + "\n" + "\n".join([*_model(parts), *_schedule(parts), *_memory(parts), *data]) + "\n"


def _model(parts: Parts) -> list[str]:
    model, size = parts.plain_model(), parts.data.input_size
    count = sum(parameter.numel() for parameter in model.parameters())
    macs = count_macs(model, size)
    shown = "x".join(map(str, size))
    return [f"model: {count / 1e6:.2f} M parameters, {macs / 1e9:.2f} G multiply-adds for one image of {shown}"]


def _schedule(parts: Parts) -> list[str]:
    updates = parts.batches // parts.cfg.grad_accum_steps
    world = parts.accelerator.num_processes
    groups = sorted({float(group.get("lr_scale", 1.0)) for group in parts.optimizer.param_groups})
    scales = f", times {groups[0]:.3g} to {groups[-1]:.3g} by layer or name" if groups != [1.0] else ""
    return [
        f"batches: {parts.cfg.batch_size} images x {world} processes x {parts.cfg.grad_accum_steps} accumulated = "
        f"{parts.global_batch}",
        f"steps: {updates} updates an epoch, {parts.epochs} epochs with the cool-down, {updates * parts.epochs} in all",
        f"learning rate: {parts.lr:.3g} at most{scales}",
    ]


def _memory(parts: Parts) -> list[str]:
    memory = measure_memory(
        parts.plain_model(), parts.optimizer.optimizer, input_size=parts.data.input_size,
        num_classes=int(parts.cfg.num_classes or 0), batch=parts.cfg.batch_size, average=parts.ema is not None,
        autocast=parts.accelerator.autocast(),
    )  # fmt: skip
    kinds = {key: value for key, value in vars(memory).items() if key not in ("activations", "batch")}
    shown = ", ".join(f"{key} {value / 1e6:.0f} MB" for key, value in kinds.items() if value)
    return [
        f"memory of a process: about {memory.total / 1e9:.2f} GB: {shown}, activations "
        f"{memory.activations / 1e6:.1f} MB an image; without the libraries and the allocator's spare"
    ]


def _look(parts: Parts, split: str, dataset: Any, loader: Loader) -> str:
    """Read the first images of a split; which ones are first in training is decided by the seed."""
    dataset = dataset if dataset is not None else loader.samples.dataset
    unreadable, seen, labels = Unreadable(parts.cfg.max_bad_images), 0, []
    for batch in loader.epoch():
        unreadable.add(batch)
        labels += [label for label in batch.targets.tolist() if label != NO_LABEL]
        seen += len(batch.targets)
        if seen >= _LOOKED_AT:
            break
    if not labels:
        raise DataError(f"the {split} set has no labelled image among its first {seen}")
    if max(labels) >= int(parts.cfg.num_classes or 0):
        raise ConfigError(f"the {split} set has a label {max(labels)}, num_classes is {parts.cfg.num_classes}")
    size = f"{'about ' if isinstance(dataset, IterableDataset) else ''}{len(loader.samples.dataset)}"
    return (
        f"{split} data: {size} images, {len(parts.names) if parts.names else 'unnamed'} classes; read {seen}, "
        f"{len(unreadable.names)} of them unreadable{': ' + '; '.join(unreadable.names) if unreadable.names else ''}"
    )
