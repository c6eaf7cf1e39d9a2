"""Files that a run leaves: weights that say what they are, and states from which it continues.

Weights are safetensors with the model's name, arguments, classes and preprocessing in the header. States are torch
files, read without executing pickled code. Every file is written beside its place and moved there when complete, so
a crash or a full disk never damages what was there before.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import visionattn
from visionattn.models._checkpoint import HEADER, read_header
from visionattn.train.build import build_model
from visionattn.train.errors import CheckpointError
from visionattn.train.files import remove, write_atomically

_STATES_KEPT = 2  # the newest, and the one before in case the newest cannot be read


@dataclass(frozen=True, kw_only=True)
class WeightsInfo:
    """What a weights file says about itself: enough to rebuild the model and to evaluate it."""

    model: str
    model_kwargs: dict[str, Any]
    num_classes: int
    in_chans: int
    class_names: list[str] | None
    input_size: list[int]  # channels, height, width
    interpolation: str
    mean: list[float]
    std: list[float]
    crop_pct: float
    crop_mode: str
    dataset: str
    val_split: str
    weights: str  # raw or ema
    epoch: int  # the epoch, counted from 0, after which the weights were saved
    metrics: dict[str, float]  # on the validation split, of these weights
    version: str  # of visionattn


def save_weights(path: Path, state_dict: Mapping[str, Tensor], info: WeightsInfo) -> None:
    """Write weights as safetensors with ``info`` in the header; timm loads them as they are.

    Raises:
        CheckpointError: the file could not be written.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    header = {"format": "pt", HEADER: json.dumps(dataclasses.asdict(info))}
    write_atomically(path, lambda file: file.write(safetensors.torch.save(tensors, metadata=header)))


def read_info(path: str | Path) -> WeightsInfo | None:
    """Return what a weights file says about itself, ``None`` where it was not written by `save_weights`.

    Raises:
        CheckpointError: there is no such file, or it is damaged.
    """
    try:
        header = read_header(path)
    except (visionattn.CheckpointError, OSError) as error:
        raise CheckpointError(str(error)) from error
    if header is None:
        return None
    known = {field.name for field in dataclasses.fields(WeightsInfo)}
    values = {name: value for name, value in header.items() if name in known}
    missing = known - set(values)
    if missing:
        raise CheckpointError(f"the header of {path} lacks {', '.join(sorted(missing))}")
    return WeightsInfo(**values)


def load_model(path: str | Path) -> tuple[nn.Module, WeightsInfo]:
    """Rebuild the model of a weights file from the file alone.

    Args:
        path: written by `save_weights`.

    Returns:
        The model in evaluation mode on the CPU, and the file's information.

    Raises:
        CheckpointError: the file is missing, damaged, or does not say which model it belongs to.
    """
    info = read_info(path)
    if info is None:
        raise CheckpointError(f"{path} does not say which model it belongs to: give --model NAME")
    model = build_model(info.model, num_classes=info.num_classes, in_chans=info.in_chans, **info.model_kwargs)
    load_weights(model, path)
    return model.eval(), info


def load_weights(model: nn.Module, path: str | Path, *, keep_classifier: bool = False) -> None:
    """Load weights written by this package or published by a model's authors, strictly.

    Args:
        model: changed only if everything fits.
        path: the file.
        keep_classifier: load all but the classifier, for other classes than the file's.

    Raises:
        CheckpointError: the file is missing or damaged, holds code, or is of another architecture or class count.
    """
    try:
        visionattn.load_checkpoint(model, path, keep_classifier=keep_classifier)
    except (visionattn.CheckpointError, OSError) as error:
        raise CheckpointError(str(error)) from error


class StateStore:
    """The states of a run, in a folder; the newest ones are kept.

    Args:
        folder: where they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, state: Mapping[str, Any], update: int) -> None:
        """Write the state after ``update`` updates, then remove all but the newest ones.

        Raises:
            CheckpointError: it could not be written; older states are still there.
        """
        write_atomically(self.path(update).with_suffix(".pt"), lambda file: torch.save(dict(state), file))
        self.prune()

    def path(self, update: int) -> Path:
        """Where the state after ``update`` updates lies: a folder of parts of that name, or a file with .pt behind."""
        return self.folder / f"update-{update:09d}"

    def prune(self) -> None:
        """Remove all but the newest states."""
        for old in self.files()[_STATES_KEPT:]:
            remove(old)

    def files(self) -> list[Path]:
        """State files, or folders of their parts, the newest first."""
        return sorted(self.folder.glob("update-*"), reverse=True)

    def newest(self, report: Callable[[str], None]) -> dict[str, Any] | None:
        """Read the newest state that is intact; ``report`` is told of each that is not.

        Returns:
            The state with its tensors on the CPU, or ``None`` where there are no state files.

        Raises:
            CheckpointError: there are state files and none can be read.
        """
        files = self.files()
        for file in files:
            state, problem = _try_state(file)
            if state is not None:
                return state
            report(f"{problem}; trying the one before")
        if files:
            raise CheckpointError(f"none of the {len(files)} states in {self.folder} can be read")
        return None


def _try_state(path: Path) -> tuple[dict[str, Any] | None, str]:
    try:
        return read_state(path), ""
    except CheckpointError as error:
        return None, str(error)


def read_state(path: Path) -> dict[str, Any]:
    """Read one state: a file, or a folder with the parts of a run in shards, which are put together.

    Raises:
        CheckpointError: it is missing or damaged, or holds more than tensors and plain values.
    """
    if path.is_dir():
        return join_shards([read_state(part) for part in sorted(path.glob("process-*.pt"))], path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch writes checksums but does not look at them
        if damaged is not None:
            raise CheckpointError(f"the state {path} cannot be read: the checksum of {damaged} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise CheckpointError(f"the state {path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or "update" not in state:
        raise CheckpointError(f"{path} is not a state of a training run")
    return state


def join_shards(parts: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    """Put the processes' parts of a state together.

    Raises:
        CheckpointError: one is missing.
    """
    expected = parts[0]["processes"] if parts else 1
    if len(parts) != expected:
        raise CheckpointError(f"the state {path} has {len(parts)} of {expected} processes' parts")
    joined = _join(*[{name: value for name, value in part.items() if name != "own"} for part in parts])
    if "own" in parts[0]:
        joined["own"] = [part["own"] for part in parts]
    del joined["processes"]
    return joined


def _join(first: Any, *others: Any) -> Any:
    if isinstance(first, dict) and first.keys() == {"shard", "local"}:
        return torch.cat([part["local"] for part in (first, *others)], dim=first["shard"])
    if isinstance(first, dict):
        return {key: _join(value, *(other[key] for other in others if key in other)) for key, value in first.items()}
    if isinstance(first, list):
        return [_join(value, *(other[i] for other in others)) for i, value in enumerate(first)]
    return first
