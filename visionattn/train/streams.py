"""Streams: WebDataset shards and Hugging Face data sets that are read from front to back.

The order of a stream follows from the seed, the epoch, the process and the loading process. Every sample has its
place: one that cannot be decoded is replaced by the next that can, which then stands in two places, so that a stream
continues at any batch after passing over the samples before it, undecoded.
"""

from __future__ import annotations

import random
import re
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm.data.readers.reader_wds as timm_wds
from PIL import Image
from timm.data import IterableImageDataset
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from visionattn.train.errors import DataError
from visionattn.train.seeds import seed_all

NO_LABEL = -1  # target of an image that does not count: unlabelled, or unreadable during validation
# What Pillow and the readers raise on a damaged or missing file.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)

# image, label, index in the data set or name in a stream, unreadable files met on the way, seconds that it took
Item = tuple[Tensor | None, int, int | str, list[str], float]


class Sample(NamedTuple):
    """An image of a stream that is not decoded yet, or a part of the stream that cannot be read."""

    name: str
    load: Callable[[], tuple[Image.Image, Any] | None]  # image and label; None for a sample to leave out


def describe(name: str, error: Exception) -> str:
    """What is reported about an unreadable file: the same at every meeting, so without addresses of objects."""
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(str(error).split()))
    return f"{name} ({type(error).__name__}: {text[:120]})"


def open_shards(root: str, **arguments: Any) -> Any:
    """Open WebDataset shards; the arguments are those of timm's reader."""
    return IterableImageDataset(root, reader=Shards(root=root, **arguments))


def open_table(name: str, root: str | None, **arguments: Any) -> Any:
    """Open a Hugging Face data set as a stream; the arguments are those of timm's reader."""
    from visionattn.train.hub import Table

    return IterableImageDataset(root or name, reader=Table(name=name, root=root, **arguments))


class Shards(timm_wds.ReaderWds):
    """timm's reader of WebDataset shards, in an order of its own, decoding on demand."""

    problems: list[str]  # parts of shards that could not be read

    def stream(self, epoch: int) -> Iterator[Sample]:
        """This loading process's share of an epoch, once through; in training shuffled."""
        import webdataset as wds

        self._lazy_init()  # finds out which loading process of which process this is
        files = [str(Path(self.root, name)) for name in self.split_info.filenames]
        if self.is_training:
            random.Random(f"{self.common_seed} {epoch}").shuffle(files)
        if self.is_training and len(files) < self.global_num_workers:
            raise DataError(
                f"{len(files)} shards for {self.global_num_workers} loading processes in all: lower --workers, or "
                "write more shards"
            )
        self.problems = []
        stages = [
            wds.SimpleShardList(files[self.global_worker_id :: self.global_num_workers]),
            wds.tarfile_to_samples(handler=self._note),
        ]
        if self.is_training:
            rng = random.Random(f"{self.common_seed} {epoch} {self.global_worker_id}")
            stages.append(wds.shuffle(self.sample_shuffle_size, initial=self.sample_initial_size, rng=rng))
        for raw in wds.DataPipeline(*stages):
            yield Sample(f"{raw['__url__']}:{raw['__key__']}", partial(self._decode, raw))

    def _note(self, error: Exception) -> bool:
        # webdataset appends where it was to what the error says: the stream, whose name is a path, or the address.
        where = getattr(error.args[-1], "name", error.args[-1])
        error.args = error.args[:1]
        self.problems.append(describe(f"a shard, {where}", error))
        return True

    def _decode(self, raw: dict[str, Any]) -> tuple[Image.Image, Any] | None:
        target_key = self.target_keys or self.target_key
        decoded = timm_wds._decode(
            raw, image_key=self.input_key, image_mode=self.input_img_mode, target_key=target_key,
            alt_label=self.split_info.alt_label,
        )  # fmt: skip
        if decoded is None:
            return None
        label = decoded["target"]
        return decoded["jpg"], self.class_to_idx[label] if self.remap_class else label


class StreamSamples(IterableDataset[Item]):
    """Decodes and transforms a stream; a sample that cannot be read is replaced by the next one that can.

    Args:
        dataset: timm's `IterableImageDataset` around one of the readers above.
        transform: from a Pillow image to a tensor ``[C, H, W]``.
        seed: of the augmentation; ``None`` for validation, where an unreadable sample gets no label.
        rank: this process.
        batch_size: of the loader, whose loading processes take whole batches in turn.
        give_up: unreadable samples in a row after which the item has no image.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable[[Any], Any],
        *,
        seed: int | None,
        rank: int,
        batch_size: int,
        give_up: int,
    ) -> None:
        self.dataset, self.transform, self.seed, self.rank = dataset, transform, seed, rank
        self.batch_size, self.give_up = batch_size, give_up
        self.epoch = self.rounds = 0

    def set_epoch(self, epoch: int, rounds: int = 0) -> None:
        """Choose an epoch, and how many batches of every loading process to pass over; before its iteration begins."""
        self.epoch, self.rounds = epoch, rounds

    def __len__(self) -> int:
        """Samples of this process in an epoch."""
        return len(self.dataset)

    def __iter__(self) -> Iterator[Item]:
        """Yield the items of this loading process."""
        worker = get_worker_info()
        skip, number = self.rounds * self.batch_size, worker.id if worker else 0
        waiting: list[tuple[int, str]] = []  # places of unreadable samples, until one comes that can be read
        unreadable: list[str] = []
        last: tuple[Image.Image, Any, str] | None = None
        place, started = 0, time.perf_counter()
        for sample in self._samples():
            if place < skip:
                place += 1
                continue
            unreadable += self._shard_problems()
            try:
                loaded = sample.load()
            except (*UNREADABLE, KeyError) as error:
                unreadable.append(describe(sample.name, error))
                loaded = None
                if len(unreadable) > self.give_up:
                    yield None, NO_LABEL, sample.name, unreadable, 0.0
                    return
            if loaded is None:
                waiting.append((place, sample.name))
                place += 1
                continue
            last = (*loaded, sample.name)
            for where, name in [*waiting, (place, sample.name)]:
                yield self._item(number, where, last, name, unreadable, started)
                unreadable, started = [], time.perf_counter()
            waiting.clear()
            place += 1
        unreadable += self._shard_problems()
        for where, name in waiting:  # the stream ends with unreadable samples
            if last is None:
                yield None, NO_LABEL, name, unreadable, 0.0
                return
            yield self._item(number, where, last, name, unreadable, started)
            unreadable, started = [], time.perf_counter()

    def _item(
        self, worker: int, place: int, loaded: tuple[Image.Image, Any, str], name: str, unreadable: list[str],
        started: float,
    ) -> Item:  # fmt: skip
        image, label, source = loaded
        if self.seed is not None:
            seed_all(self.seed, self.epoch, self.rank, worker, place)
        if label is None or (self.seed is None and name != source):
            label = NO_LABEL
        return self.transform(image), int(label), source, unreadable, time.perf_counter() - started

    def _samples(self) -> Iterator[Sample]:
        """In training as many as this loading process has to give, in several passes if need be."""
        reader = self.dataset.reader
        if not reader.is_training:
            yield from reader.stream(self.epoch)
            return
        given, wanted = 0, None
        while wanted is None or given < wanted:
            before = given
            for sample in reader.stream(self.epoch):
                wanted = reader._num_samples_per_worker()
                if given == wanted:
                    return
                given += 1
                yield sample
            if given == before:
                raise DataError("a loading process got no samples: lower --workers, or write more shards")

    def _shard_problems(self) -> list[str]:
        found, self.dataset.reader.problems = self.dataset.reader.problems, []
        return found
