"""The evaluation sets of ImageNet classifiers: where they lie, which classes they hold, how answers are judged."""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from visionattn.train.errors import ConfigError, DataError

# Names of `--sets`. Folders of classes are named by WordNet identifiers; those of -V2 by the label's number.
SETS = ("imagenet", "real", "v2", "a", "r", "sketch", "c")
_SPLITS = ("val", "validation")


@dataclass(frozen=True)
class Benchmark:
    """One evaluation.

    Attributes:
        name: of the set; of ImageNet-C with corruption and severity, as in ``c/fog/3``.
        folder: holds the class folders.
        class_map: from folder names to labels of ImageNet-1K.
        columns: labels among which the answer is sought, where they are fewer than all.
        real: whether every label of the reassessed ImageNet counts as right.
    """

    name: str
    folder: Path
    class_map: dict[str, int]
    columns: tuple[int, ...] | None = None
    real: bool = False


def open_benchmarks(sets: dict[str, str]) -> list[Benchmark]:
    """Find the sets that are asked for.

    Args:
        sets: from a name of `SETS` to the folder of the set: of its classes, or holding val/; of ImageNet-C the one
            that holds the corruptions, each with its severities.

    Raises:
        ConfigError: there is no set of that name.
        DataError: there is no such folder.
    """
    unknown = sorted(set(sets) - set(SETS))
    if unknown:
        raise ConfigError(f"unknown set {', '.join(unknown)}; known: {', '.join(SETS)}")
    label_of = {name: label for label, name in enumerate(synsets("imagenet"))}
    found = []
    for name, path in sets.items():
        folder = Path(path)
        if not folder.is_dir():
            raise DataError(f"the set {name!r} is not there: {folder} is no folder")
        if name == "c":
            found += [Benchmark(f"c/{part}", folder / part, label_of) for part in _corruptions(folder)]
            continue
        folder = next((folder / split for split in _SPLITS if (folder / split).is_dir()), folder)
        if name in ("a", "r"):
            own = synsets(f"imagenet_{name}")
            columns = tuple(label_of[synset] for synset in own)
            found.append(Benchmark(name, folder, {synset: label_of[synset] for synset in own}, columns))
        elif name == "v2":
            found.append(Benchmark(name, folder, {str(label): label for label in range(len(label_of))}))
        else:
            found.append(Benchmark(name, folder, label_of, real=name == "real"))
    return found


def synsets(name: str) -> list[str]:
    """WordNet identifiers of the classes of ``imagenet``, ``imagenet_a`` or ``imagenet_r``, by label."""
    return _shipped(f"{name}_synsets.txt").split()


def _shipped(file: str) -> str:
    """Text of a file that timm ships."""
    data = pkgutil.get_data("timm.data", f"_info/{file}")
    assert data is not None
    return data.decode()


def _corruptions(root: Path) -> list[str]:
    """Corruption and severity of each folder of ImageNet-C; it is published in groups, which may be there or not."""
    parts = sorted(
        path.relative_to(root).as_posix() for path in root.glob("**/[1-5]") if path.is_dir() and path.parent != root
    )
    if not parts:
        raise DataError(f"no ImageNet-C in {root}: expected folders <corruption>/<severity 1 to 5>/<class>")
    return parts


def real_labels(files: Sequence[str], classes: int) -> Tensor:
    """Labels that the reassessed ImageNet (arXiv:2006.07159) accepts, as timm ships them.

    Args:
        files: names of validation images, ``ILSVRC2012_val_00000001.JPEG`` and so on.
        classes: of the model.

    Returns:
        Booleans ``(len(files), classes)``; a row of an image without a label holds none.

    Raises:
        DataError: a file is not one of ImageNet's validation images.
    """
    labels = json.loads(_shipped("imagenet_real_labels.json"))
    accepted = torch.zeros(len(files), classes, dtype=torch.bool)
    for row, file in enumerate(files):
        number = Path(file).stem.rpartition("_")[2]
        if not number.isdigit() or not 1 <= int(number) <= len(labels):
            raise DataError(f"{file} is no validation image of ImageNet, so ReaL has no labels for it")
        accepted[row, labels[int(number) - 1]] = True
    return accepted
