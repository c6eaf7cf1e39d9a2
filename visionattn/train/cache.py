"""Decoded images kept on a disk: reading one again costs a copy, not the decoding of a large file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionattn.train.errors import ConfigError
from visionattn.train.files import write_atomically


class DecodedCache:
    """Keeps images as raw pixels, those with larger sides shrunk to one shorter side.

    What is returned is the same at the first reading and at every later one.

    Args:
        folder: of the cache; of one data set alone.
        side: pixels of the shorter side of an image that is larger.
        source: what the images come from, in plain values.

    Raises:
        ConfigError: the folder holds another data set's images, or ones of another size.
    """

    def __init__(self, folder: Path, side: int, source: dict[str, Any]) -> None:
        self.folder, self.side = folder, side
        note, wanted = folder / "source.json", json.dumps({**source, "side": side}, sort_keys=True)
        if note.is_file() and note.read_text() != wanted:
            raise ConfigError(
                f"the cache {folder} holds {note.read_text()}, asked for is {wanted}: name another folder"
            )
        write_atomically(note, lambda file: file.write(wanted.encode()))

    def load(self, index: int, decode: Callable[[], Image.Image]) -> Image.Image:
        """Return the image of an index, decoded where it is not kept yet, or where what is kept is damaged."""
        path = self.folder / f"{index // 1000:06d}" / f"{index:09d}.npy"
        if path.is_file():
            try:
                return Image.fromarray(np.load(path))
            except (ValueError, OSError, EOFError):
                path.unlink(missing_ok=True)
        image = self._shrink(decode())
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")  # loading processes may meet at one image
        with part.open("wb") as file:
            np.save(file, np.asarray(image))
        part.replace(path)
        return image

    def _shrink(self, image: Image.Image) -> Image.Image:
        factor = self.side / min(image.size)
        if factor >= 1:
            return image
        return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
