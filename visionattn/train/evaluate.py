"""Accuracy and loss of a model on a validation loader."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from visionattn.train.data import NO_LABEL, Batch, Loader, valid_samples
from visionattn.train.errors import ConfigError, DataError
from visionattn.train.signals import Stopped


class Unreadable:
    """Counts the files that could not be read, and stops a run that meets too many.

    Args:
        limit: most files to tolerate.
        names: files that an earlier part of the run met.
    """

    def __init__(self, limit: int, names: list[str] | None = None) -> None:
        self.limit = limit
        self.names = dict.fromkeys(names or [])

    def add(self, batch: Batch) -> list[str]:
        """Count a batch's unreadable files; return those that are new.

        Raises:
            DataError: more than the limit were met.
        """
        new = [name for name in dict.fromkeys(batch.unreadable) if name not in self.names]
        self.names.update(dict.fromkeys(new))
        if len(self.names) > self.limit or batch.images is None:
            raise DataError(
                f"{len(self.names)} images could not be read, more than max_bad_images ({self.limit}) allows; "
                f"the last ones: {'; '.join(list(self.names)[-3:])}"
            )
        return new


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    accelerator: Accelerator,
    *,
    unreadable: Unreadable,
    channels_last: bool = False,
    progress: bool = False,
    label: str = "validate",
    stop: Callable[[int], bool] | None = None,
    columns: Sequence[int] | None = None,
    accepted: torch.Tensor | None = None,
) -> dict[str, float]:
    """Evaluate ``model`` on all samples of ``loader``, over all processes.

    Args:
        model: in any mode, which it keeps.
        loader: of this process's share.
        accelerator: of the run.
        unreadable: counts what cannot be read.
        channels_last: memory layout of the images.
        progress: draw a bar.
        label: of the bar.
        stop: asked before each batch, with its number, whether to give up. It may wait for the other processes, so
            it is not asked where these may see different numbers of batches: streams in several processes.
        columns: labels among which the answer is sought, where they are fewer than all.
        accepted: booleans ``(images, classes)``: labels that are right for an image; rows without any do not count.

    Returns:
        ``loss`` (cross-entropy, without smoothing), ``top1`` and ``top5`` in percent, ``samples``, and
        ``images_per_second`` over all processes, with loading.

    Raises:
        DataError: no sample has a label, or too many files are unreadable.
        ConfigError: a label is beyond the model's classes.
        Stopped: ``stop`` said so.
    """
    device = accelerator.device
    was_training = model.training
    model.eval()
    totals = torch.zeros(4, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    valid, seen, started = valid_samples(loader), 0, time.perf_counter()
    bar = tqdm(
        loader.epoch(), desc=label, total=len(loader.loader) or None, leave=False, dynamic_ncols=True,
        disable=None if progress and accelerator.is_main_process else True,
    )  # fmt: skip
    if accelerator.num_processes > 1 and valid is None:
        stop = None
    for number, batch in enumerate(bar):
        if stop is not None and stop(number):
            bar.close()
            raise Stopped
        unreadable.add(batch)
        images, targets = to_device(batch, device, channels_last)
        if valid is not None:  # the end of a share is padding
            targets = torch.where(torch.arange(seen, seen + len(targets), device=device) < valid, targets, NO_LABEL)
        seen += len(targets)
        with accelerator.autocast():
            logits = model(images)
        right = accepted[torch.tensor(batch.indices)].to(device) if accepted is not None else None
        totals += _sums(logits.float(), targets, columns, right).to(totals.dtype)
    loss, top1, top5, count = accelerator.reduce(totals, "sum").tolist()
    model.train(was_training)
    if count == 0:
        raise DataError("the validation set has no labelled image")
    seconds = time.perf_counter() - started
    return {
        "loss": loss / count,
        "top1": 100 * top1 / count,
        "top5": 100 * top5 / count,
        "samples": count,
        "images_per_second": count / seconds,
    }


def to_device(batch: Batch, device: torch.device, channels_last: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``[B, C, H, W]`` and targets ``[B]`` on the device."""
    layout: dict[str, Any] = {"memory_format": torch.channels_last} if channels_last else {}
    assert batch.images is not None  # `Unreadable.add` stopped the run otherwise
    images = batch.images.to(device, non_blocking=True, **layout)
    return images, batch.targets.to(device, non_blocking=True)


def _sums(
    logits: torch.Tensor, targets: torch.Tensor, columns: Sequence[int] | None, right: torch.Tensor | None
) -> torch.Tensor:
    """Loss, correct in the first guess, in the first five, and number, summed over the labelled samples."""
    classes = logits.shape[1]
    if int(targets.max()) >= classes:
        raise ConfigError(f"the data has a label {int(targets.max())}, the model only {classes} classes")
    if columns is not None:
        place = torch.full((classes,), NO_LABEL, device=targets.device)
        place[list(columns)] = torch.arange(len(columns), device=targets.device)
        logits, classes = logits[:, list(columns)], len(columns)
        targets = torch.where(targets == NO_LABEL, NO_LABEL, place[targets])
    if right is not None:
        targets = torch.where(right.any(1), targets, NO_LABEL)
    counted = targets != NO_LABEL
    ranked = logits.topk(min(5, classes), dim=1).indices == targets[:, None]  # a NO_LABEL target matches nothing
    if right is not None:
        ranked = right.gather(1, logits.topk(min(5, classes), dim=1).indices) & counted[:, None]
    loss = F.cross_entropy(logits, targets, ignore_index=NO_LABEL, reduction="sum")
    return torch.stack([loss, ranked[:, 0].sum(), ranked.any(1).sum(), counted.sum()])
