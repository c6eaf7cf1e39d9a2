"""What a run shows and records: lines, progress bars, `args.yaml`, `summary.csv`, TensorBoard."""

from __future__ import annotations

import csv
import io
import platform
import resource
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import accelerate
import timm
import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from visionattn import __version__
from visionattn.train.cli import to_yaml
from visionattn.train.errors import require
from visionattn.train.files import write_atomically


class Report:
    """Writes to the terminal and to a run's folder; in processes other than the first it does nothing.

    Args:
        folder: of the run.
        active: whether this process reports.
        progress: whether to draw progress bars (on a terminal).
        tensorboard: whether to write event files.
        first_update: updates done before, on resuming; later events of an interrupted run are dropped.
    """

    def __init__(self, folder: Path, *, active: bool, progress: bool, tensorboard: bool, first_update: int) -> None:
        self.folder, self.active, self.progress = folder, active, progress
        self.bars = active and progress and sys.stderr.isatty()
        self._events: Any = None
        if active and tensorboard:
            module = require("torch.utils.tensorboard", "--tensorboard")
            self._events = module.SummaryWriter(str(folder / "tb"), purge_step=first_update or None)

    def line(self, text: str) -> None:
        """Print a line above the progress bars."""
        if self.active:
            tqdm.write(text)
            sys.stdout.flush()

    def bar(self, label: str, total: int, start: int) -> tqdm[Any]:
        """A progress bar over updates."""
        return tqdm(
            desc=label, total=total, initial=start, leave=False, dynamic_ncols=True, disable=not self.bars,
            unit="update",
        )  # fmt: skip

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """Record values at an update in the event files."""
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, update)

    def epoch(self, history: Sequence[Mapping[str, Any]], update: int, unreadable: Iterable[str]) -> None:
        """Record the epoch that just ended, the last row of ``history``; call it in every process.

        Args:
            history: a row for each epoch so far; `summary.csv` is written anew.
            update: updates done.
            unreadable: images of this process that could not be read, since the run began.
        """
        names = sorted(set(gather_object(list(unreadable))))
        if not self.active:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(history[-1]), restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(history)
        self.text("summary.csv", text.getvalue())
        row = history[-1]
        self.scalars({name.replace("_", "/", 1): value for name, value in row.items() if name[:5] == "eval_"}, update)
        if self._events is not None:
            self._events.flush()
        if names:
            self.text("unreadable.txt", "\n".join(names) + "\n")
            self.line(f"{len(names)} unreadable images so far, listed in {self.folder / 'unreadable.txt'}:")
            for name in names[:10]:
                self.line(f"  {name}")

    def text(self, name: str, text: str) -> None:
        """Write a text file of the run."""
        if self.active:
            write_atomically(self.folder / name, lambda file: file.write(text.encode()))

    def close(self) -> None:
        """End the event files."""
        if self._events is not None:
            self._events.close()


def peak_memory(device: torch.device) -> float:
    """Megabytes (10^6 bytes) that this process held at most: of tensors on a GPU, else of everything."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB, on macOS in bytes
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def versions() -> dict[str, str]:
    """Versions of what computes."""
    return {
        "visionattn": __version__, "torch": torch.__version__, "timm": timm.__version__,
        "accelerate": accelerate.__version__, "python": platform.python_version(),
    }  # fmt: skip


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def describe_run(cfg: Any, device: torch.device, world: int) -> str:
    """The text of `args.yaml`: every argument, below comments that name versions, device and time."""
    when = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return to_yaml(
        cfg,
        header=[
            ", ".join(f"{name} {version}" for name, version in versions().items()),
            f"{world} x {device.type} ({device_name(device)}), {when}",
        ],
    )


def epoch_line(row: Mapping[str, Any], epochs: int) -> str:
    """One line about an epoch, from its row of `summary.csv`."""
    ema = f" (ema {row['eval_ema_top1']:.2f})" if "eval_ema_top1" in row else ""
    return (
        f"epoch {row['epoch'] + 1:>3}/{epochs}  loss {row['train_loss']:.4f}  val loss {row['eval_loss']:.4f}  "
        f"top1 {row['eval_top1']:.2f}{ema}  lr {row['lr']:.2e}  {row['images_per_second']:.0f} img/s "
        f"(input {row['input_images_per_second']:.0f})  data wait {100 * row['data_wait']:.0f} %  "
        f"{row['seconds']:.0f} s"
    )
