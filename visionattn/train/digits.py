"""scikit-learn's bundled digits as images: 1797 handwritten digits of 8x8 pixels, nothing to download."""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from visionattn.train.errors import require

_HELD_OUT = 5  # one image in five of each class is for validation


class Digits(Dataset[tuple[Image.Image, int]]):
    """The digits 0 to 9 as RGB images of 8x8 pixels with their labels.

    The split is fixed and keeps the share of each class: of each digit's images, in the order of the source, every
    fifth is for validation (364 images), the others are for training (1433).

    Args:
        split: which part.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """

    classes = tuple("0123456789")

    def __init__(self, split: Literal["train", "validation"]) -> None:
        source = require("sklearn.datasets", "the data set 'digits'").load_digits()
        images, labels = source.images, source.target  # [1797, 8, 8] of 0..16, [1797]
        rank = np.empty_like(labels)  # how many images of the same digit come before
        for digit in range(len(self.classes)):
            members = np.flatnonzero(labels == digit)
            rank[members] = np.arange(len(members))
        chosen = (rank % _HELD_OUT == 0) == (split == "validation")
        self.pixels = np.round(images[chosen] * (255 / 16)).astype(np.uint8)
        self.labels = [int(label) for label in labels[chosen]]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Image and label at ``index``."""
        return Image.fromarray(self.pixels[index]).convert("RGB"), self.labels[index]
