"""A few validation images with the model of a checkpoint, for looking at."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import create_transform
from torch import Tensor, nn

from visionattn.train.checkpoint import load_model
from visionattn.train.cli import read_yaml
from visionattn.train.data import DataConfig, open_dataset


class Samples(NamedTuple):
    """Images as the model takes them and as a person sees them."""

    model: nn.Module
    inputs: Tensor  # (B, C, H, W)
    images: list[Any]  # PIL, cropped as the model sees them
    labels: list[int]
    class_names: list[str] | None


def validation_samples(checkpoint: Path, *, count: int, data_dir: str | None = None) -> Samples:
    """Take ``count`` images of as many classes as there are, from the validation set of a checkpoint.

    Args:
        checkpoint: Weights that `visionattn.train.train` wrote.
        count: Images to take; all there are, if fewer.
        data_dir: The data set's folder; that of the training run if None.

    Raises:
        TrainError: the checkpoint or the data set cannot be opened; the message says why.
    """
    model, info = load_model(checkpoint)
    beside = checkpoint.parent / "args.yaml"
    if data_dir is None and beside.is_file():
        data_dir = read_yaml(beside).get("data_dir")
    data = DataConfig(**{key: getattr(info, key) for key in DataConfig._fields})
    dataset = open_dataset(info.dataset, data_dir, info.val_split, training=False, in_chans=info.in_chans)
    channels, height, width = data.input_size
    options = {key: value for key, value in data._asdict().items() if key != "input_size"}
    transform: Any = create_transform((channels, height, width), **options)
    candidates = [dataset[int(i)] for i in torch.linspace(0, len(dataset) - 1, min(5 * count, len(dataset)))]
    seen: Counter[int] = Counter()
    turn = []  # how many images of the same class came before
    for _, label in candidates:
        turn.append(seen[int(label)])
        seen[int(label)] += 1
    order = sorted(range(len(candidates)), key=lambda i: (turn[i], int(candidates[i][1])))
    items = [candidates[i] for i in order[:count]]
    inputs = torch.stack([transform(image) for image, _ in items])
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    shown = (inputs * std + mean).clamp(0, 1)  # (B, C, H, W)
    images = [x.permute(1, 2, 0).squeeze(-1).numpy() for x in shown]
    return Samples(model, inputs, images, [int(label) for _, label in items], info.class_names)
