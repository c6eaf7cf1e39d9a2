"""Tiny models, tiny data: what the training tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from visionattn.train import TrainConfig


@pytest.fixture(autouse=True)
def _fresh_process_state() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process; each test begins anew, on one thread for equal sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(threads)


def make_images(folder: Path) -> Path:
    """A folder of images: two classes, told apart by brightness, 24 to train and 8 to validate."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name, level in (("dark", 60), ("light", 190)):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(level - 50, level + 50, (16, 16, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """See `make_images`."""
    return make_images(tmp_path / "images")


@pytest.fixture
def tiny(images: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """Makes a configuration of a run that takes a second; arguments override it."""

    def make(**changes: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "model": "test_resnet", "data_dir": str(images), "img_size": 32, "batch_size": 8, "epochs": 2,
            "warmup_epochs": 0, "lr": 1e-3, "workers": 0, "output": str(tmp_path / "out"), "experiment": "run",
            "tensorboard": False, "progress": False,
        }  # fmt: skip
        return TrainConfig(**{**values, **changes})

    return make
