"""Hugging Face data sets as streams; a module of its own because timm's reader needs the package at import."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial
from typing import Any

import datasets
from PIL import Image
from timm.data.readers.reader_hfids import ReaderHfids

from visionattn.train.errors import DataError
from visionattn.train.streams import Sample


class Table(ReaderHfids):
    """timm's reader, decoding on demand.

    Where several shards are shuffled into each other, `datasets` lets five seconds pass at the end of every pass over
    them, for Arrow's threads to end.
    """

    problems: list[str]  # the same as of shards; here every problem is a sample's

    def stream(self, epoch: int) -> Iterator[Sample]:
        """This loading process's share of an epoch, once through; in training shuffled."""
        if self.ds is None:
            try:
                self._lazy_init()
            except RuntimeError as error:  # fewer shards than loading processes
                raise DataError(str(error)) from error
            assert self.ds is not None
            self.ds = self.ds.cast_column(self.input_key, datasets.Image(decode=False))
        self.problems = []
        self.ds.set_epoch(epoch)
        for number, raw in enumerate(self.ds):
            name = raw[self.input_key].get("path") or f"sample {number}"
            yield Sample(f"{self.name}:{self.split}:{name}", partial(self._decode, raw))

    def _decode(self, raw: dict[str, Any]) -> tuple[Image.Image, Any]:
        stored = raw[self.input_key]
        source = io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]
        with Image.open(source) as image:
            decoded = image.convert(self.input_img_mode or image.mode)
        label = raw[self.target_key]
        return decoded, self.class_to_idx[label] if self.remap_class else label
