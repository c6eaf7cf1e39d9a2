"""Data sets by timm's readers, and loaders whose every random choice follows from the seed, the epoch and the position.

A sample's augmentation is seeded by its position in the epoch, so it depends neither on the number of loading
processes nor on where a run was resumed.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform
from timm.data.distributed_sampler import OrderedDistributedSampler, RepeatAugSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

from visionattn.train.cache import DecodedCache
from visionattn.train.config import TrainConfig
from visionattn.train.digits import Digits
from visionattn.train.errors import ConfigError, DataError, require
from visionattn.train.seeds import seed_all
from visionattn.train.streams import NO_LABEL, UNREADABLE, Item, StreamSamples, describe, open_shards, open_table

_TRAIN_FOLDERS = ("train", "training")
_VAL_FOLDERS = ("validation", "val", "valid", "eval", "evaluation", "test")


class Batch(NamedTuple):
    """What a loader yields: B images and what is known about them."""

    images: Tensor | None  # [B, C, H, W]; None when too many files were unreadable to fill it
    targets: Tensor  # [B] of int64, `NO_LABEL` where there is none
    indices: list[int | str]  # B positions in the data set, or names in a stream
    unreadable: list[str]  # files that were skipped and replaced by the next readable one
    seconds: float  # that one loading process took to make it


class DataConfig(NamedTuple):
    """Size and normalisation of the inputs, as timm's `resolve_model_data_config` gives them."""

    input_size: tuple[int, int, int]  # channels, height, width
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    crop_mode: str


def open_dataset(
    name: str,
    root: str | None,
    split: str,
    *,
    training: bool,
    in_chans: int = 3,
    class_map: Any = None,
    num_samples: int | None = None,
    input_key: str | None = None,
    target_key: str | None = None,
    download: bool = False,
    batch_size: int = 1,
    seed: int = 0,
) -> Any:
    """Open a data set by name, without transforms.

    Args:
        name: ``digits``, ``torch/<name>``, ``wds/``, ``hfds/<name>``, ``hfids/<name>``, or empty for image folders.
        root: its folder; not needed for digits and optional for ``hfds/`` and ``hfids/``.
        split: for image folders the sub-folder; validation folders are found under any usual name, and ``.`` is
            the root itself.
        training: whether streams are shuffled and repeated.
        in_chans: 1 reads images as grey, 3 as RGB.
        class_map: a mapping from class names to labels, or a text file with one name a line.
        num_samples: length of a stream, where its own info file does not say.
        input_key: key of the image in shards or tables.
        target_key: key of the label in shards or tables.
        download: let the reader download.
        batch_size: of a stream, which rounds its length to it.
        seed: of a stream's order.

    Returns:
        A timm, torchvision or `Digits` data set.

    Raises:
        DataError: there is no such data set, or it is empty; the message says where it was looked for.
        MissingDependencyError: its reader needs a package that is not installed.
    """
    prefix = name.partition("/")[0].lower()
    if name == "digits":
        return Digits("train" if split in _TRAIN_FOLDERS else "validation")
    if prefix in ("hfds", "hfids"):
        require("datasets", f"the data set {name!r}", "visionattn[data]")
    elif root is None:
        raise DataError(
            f"the data set {name or 'image folder'!r} needs its folder: give --data-dir, or --dataset digits"
        )
    elif prefix == "wds":
        require("webdataset", f"the data set {name!r}", "visionattn[data]")
    elif prefix == "" and not root.endswith(".tar"):
        root = str(find_split(Path(root), split))
    keys: dict[str, Any] = {
        key: value for key, value in (("input_key", input_key), ("target_key", target_key)) if value is not None
    }
    streaming: dict[str, Any] = {
        "split": split, "is_training": training, "class_map": class_map, "num_samples": num_samples, "seed": seed,
        "batch_size": batch_size, "input_img_mode": "L" if in_chans == 1 else "RGB", **keys,
    }  # fmt: skip
    try:
        if prefix == "wds":
            dataset: Any = open_shards(str(root), **streaming)
        elif prefix == "hfids":
            dataset = open_table(name.partition("/")[2], root, download=download, **streaming)
        elif prefix == "torch":
            dataset = create_dataset(name, root=root, split=split, download=download)
        else:
            dataset = create_dataset(
                name, root=root, split=split, search_split=False, is_training=training, class_map=class_map,
                download=download, input_img_mode=streaming["input_img_mode"], **keys,
            )  # fmt: skip
    except (RuntimeError, AssertionError, OSError, ValueError) as error:
        raise DataError(f"cannot open the split {split!r} of {name or 'the images'!r} in {root}: {error}") from error
    if not isinstance(dataset, IterableDataset) and len(dataset) == 0:
        raise DataError(f"the split {split!r} of {name or 'the images'!r} in {root} is empty")
    return dataset


def find_split(root: Path, split: str) -> Path:
    """Return the folder of a split of an image folder data set.

    Raises:
        DataError: the root or the split does not exist, or holds no sub-folders.
    """
    if not root.is_dir():
        raise DataError(f"no data: the folder {root} does not exist; check --data-dir")
    kinds = [names for names in (_TRAIN_FOLDERS, _VAL_FOLDERS) if split in names and split != "test"]
    names = list(dict.fromkeys([split, *(kinds[0] if kinds else ())]))
    found = next((root / name for name in names if (root / name).is_dir()), None)
    inside = sorted(path.name for path in root.iterdir() if path.is_dir())
    if found is None:
        shown = ", ".join(inside[:8]) + (", ..." if len(inside) > 8 else "") or "no folders"
        raise DataError(
            f"no {split!r} split in {root}: looked for {', '.join(name + '/' for name in names)}, found {shown}; "
            "put one folder a class in it, or name another split (. is the folder itself)"
        )
    if not any(path.is_dir() for path in found.iterdir()):
        raise DataError(f"no data: {found} holds no class folders; expected {found}/<class name>/<image files>")
    return found


def class_names(dataset: Any) -> tuple[str, ...] | None:
    """Names in the order of the labels, or ``None`` where the data set does not tell them."""
    mapping = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    if mapping:
        by_label = {label: str(name) for name, label in mapping.items()}
        return tuple(by_label.get(label, str(label)) for label in range(max(by_label) + 1))
    names = getattr(dataset, "classes", None)
    return tuple(str(name) for name in names) if names else None


def check_classes(known: Sequence[str] | None, dataset: Any, what: str, reference: str) -> None:
    """Check that a data set's class folders are among the known classes.

    Raises:
        DataError: it has other classes; timm's reader would drop their images silently.
    """
    root = getattr(getattr(dataset, "reader", None), "root", None)
    samples = getattr(getattr(dataset, "reader", None), "samples", None)
    if known is None or root is None or samples is None or not Path(root).is_dir():
        return
    strange = sorted({path.name for path in Path(root).iterdir() if path.is_dir()} - set(known))
    if strange:
        raise DataError(
            f"{what} {root} has class folders that {reference} lacks: {', '.join(strange[:5])}"
            + (f" and {len(strange) - 5} more" if len(strange) > 5 else "")
        )


def name_of(dataset: Any, index: int | str) -> str:
    """File name of a sample, or its number where it has none; names in streams are names already."""
    if isinstance(index, str):
        return index
    if hasattr(getattr(dataset, "reader", None), "filename"):
        return str(dataset.filename(index, absolute=True))
    return f"image {index}"


class Samples(Dataset[Item]):
    """Reads, decodes and transforms; a file that cannot be read is replaced by the next one that can.

    Args:
        dataset: as `open_dataset` returns it.
        transform: from a Pillow image to a tensor ``[C, H, W]``.
        mode: Pillow mode to convert to.
        drop_unreadable: give the replacement of an unreadable file no label, so that it does not count.
        give_up: unreadable files in a row after which the item has no image.
        cache: keeps decoded images.
    """

    def __init__(
        self, dataset: Any, transform: Callable[[Any], Any], *, mode: str, drop_unreadable: bool, give_up: int,
        cache: DecodedCache | None = None,
    ) -> None:  # fmt: skip
        self.dataset, self.transform, self.mode = dataset, transform, mode
        self.drop_unreadable, self.give_up, self.cache = drop_unreadable, give_up, cache

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)

    def __getitem__(self, key: int | tuple[int, int]) -> Item:
        """Item at an index, or at an index with the seed of its augmentation."""
        index, seed = key if isinstance(key, tuple) else (key, None)
        started = time.perf_counter()
        unreadable: list[str] = []
        for place in range(index, index + min(self.give_up + 1, len(self))):
            try:
                image, label = self._read(place % len(self))
            except UNREADABLE as error:
                unreadable.append(describe(name_of(self.dataset, place % len(self)), error))
                continue
            if seed is not None:
                seed_all(seed)
            if label is None or (unreadable and self.drop_unreadable):
                label = NO_LABEL
            image = self.transform(image)
            return image, int(label), place % len(self), unreadable, time.perf_counter() - started
        return None, NO_LABEL, index, unreadable, 0.0

    def _read(self, index: int) -> tuple[Image.Image, Any]:
        reader = getattr(self.dataset, "reader", None)
        if reader is None:
            image, label = self.dataset[index]
            return image.convert(self.mode), label
        file, label = reader[index]
        with file:
            if self.cache is not None:
                return self.cache.load(index, lambda: Image.open(file).convert(self.mode)), label
            return Image.open(file).convert(self.mode), label


class EpochSampler(Sampler[tuple[int, int]]):
    """Shuffled indices of this process, each with the seed of its augmentation.

    Position p of process r is position p * world + r of the epoch, whose order and seeds follow from the seed and
    the epoch alone.

    Args:
        length: size of the data set.
        seed: of the run.
        rank: this process.
        world: number of processes.
        repeats: copies of an image in an epoch (repeated augmentation); 0 for one pass over the data.
        multiple: the number of samples is cut to a multiple of this.
    """

    def __init__(self, length: int, *, seed: int, rank: int, world: int, repeats: float, multiple: int) -> None:
        places = range(length)
        self.inner: RepeatAugSampler | DistributedSampler[int] = (
            RepeatAugSampler(places, world, rank, num_repeats=repeats)
            if repeats
            else DistributedSampler(places, world, rank, shuffle=True, seed=0, drop_last=True)  # type: ignore[arg-type]
        )
        self.seed, self.rank, self.world, self.epoch, self.start = seed, rank, world, 0, 0
        self.total = len(self.inner) // multiple * multiple

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch, and how many samples of it are done already."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Samples that are left of the epoch."""
        return self.total - self.start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield index and seed."""
        words = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1 + self.total * self.world)
        seeds = words[1 + self.rank :: self.world]
        self.inner.set_epoch(int(words[0]))
        for position, index in enumerate(itertools.islice(self.inner, self.total)):
            if position >= self.start:
                yield index, int(seeds[position])


class Loader:
    """A `torch.utils.data.DataLoader` that can begin at any batch of any epoch.

    Args:
        samples: what to load.
        sampler: order of a map-style training set.
        updates: batches of an epoch, or ``None`` for all there are.
        arguments: further arguments of the DataLoader.
    """

    def __init__(
        self, samples: Samples | StreamSamples, sampler: Sampler[Any] | None, batches: int | None, **arguments: Any
    ) -> None:
        self.samples, self.sampler, self.batches = samples, sampler, batches
        self.generator = torch.Generator()
        keep = arguments["num_workers"] > 0 and isinstance(samples, Samples)  # streams are re-seeded by new processes
        self.loader: DataLoader[Any] = DataLoader(
            samples, sampler=sampler, generator=self.generator, collate_fn=collate, worker_init_fn=_quiet_worker,
            persistent_workers=keep, **arguments,
        )  # fmt: skip

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from number ``start`` on."""
        if self.batches is not None and start >= self.batches:
            return
        self.generator.manual_seed(epoch)
        skip = start
        if isinstance(self.sampler, EpochSampler):
            self.sampler.set_epoch(epoch, start * int(self.loader.batch_size or 1))
            skip = 0
        elif isinstance(self.samples, StreamSamples):
            workers = max(1, self.loader.num_workers)  # these take batches in turn
            self.samples.set_epoch(epoch, start // workers)
            skip = start % workers
        number = start - skip
        for batch in self.loader:
            if self.batches is not None and number >= self.batches:
                return
            number += 1
            if number > start:
                yield batch


def collate(items: list[Item]) -> Batch:
    """Put items together into a batch."""
    started = time.perf_counter()
    images = [image for image, *_ in items if image is not None]
    return Batch(
        images=torch.stack(images) if len(images) == len(items) else None,
        targets=torch.tensor([label for _, label, *_ in items]),
        indices=[index for _, _, index, *_ in items],
        unreadable=[name for _, _, _, names, _ in items for name in names],
        seconds=sum(seconds for *_, seconds in items) + time.perf_counter() - started,
    )


def train_loader(dataset: Any, cfg: TrainConfig, data: DataConfig, *, rank: int, world: int, pin: bool) -> Loader:
    """Make the shuffled and augmented loader of one process.

    Returns:
        A loader whose ``batches`` is a multiple of ``cfg.grad_accum_steps``.

    Raises:
        DataError: the set is smaller than one global batch.
    """
    jitter: Any = cfg.color_jitter
    scale: Any = cfg.scale
    ratio: Any = cfg.ratio
    transform = create_transform(
        data.input_size, is_training=True, no_aug=cfg.no_aug, train_crop_mode=cfg.train_crop_mode, scale=scale,
        ratio=ratio, hflip=cfg.hflip, vflip=cfg.vflip,
        color_jitter=jitter[0] if jitter is not None and len(jitter) == 1 else jitter, auto_augment=cfg.aa,
        interpolation=data.interpolation if cfg.no_aug else cfg.train_interpolation, mean=data.mean, std=data.std,
        re_prob=cfg.reprob, re_mode=cfg.remode, re_count=cfg.recount,
    )  # fmt: skip
    per_update = cfg.batch_size * cfg.grad_accum_steps
    if isinstance(dataset, IterableDataset):
        dataset.set_loader_cfg(num_workers=cfg.workers)  # type: ignore[attr-defined]
        count, sampler = len(dataset), None  # type: ignore[arg-type]
        samples: Samples | StreamSamples = StreamSamples(
            dataset, transform, seed=cfg.seed, rank=rank, batch_size=cfg.batch_size, give_up=cfg.max_bad_images
        )
    else:
        sampler = EpochSampler(
            len(dataset), seed=cfg.seed, rank=rank, world=world, repeats=cfg.aug_repeats, multiple=per_update
        )
        count = len(sampler)
        samples = Samples(
            dataset, transform, mode=_mode(data), drop_unreadable=False, give_up=cfg.max_bad_images,
            cache=_cache(dataset, cfg, _mode(data)),
        )  # fmt: skip
    if count < per_update:
        raise DataError(
            f"the training set has {len(dataset)} images, fewer than one update takes "
            f"({cfg.batch_size} x {cfg.grad_accum_steps} accumulated x {world} processes): lower batch_size"
        )
    return Loader(
        samples, sampler, count // per_update * cfg.grad_accum_steps, batch_size=cfg.batch_size,
        num_workers=cfg.workers, pin_memory=pin, drop_last=True,
    )  # fmt: skip


def val_loader(
    dataset: Any, data: DataConfig, *, batch_size: int, workers: int, rank: int, world: int, pin: bool, max_bad: int
) -> Loader:
    """Make the loader of one process's share of a validation set, in order.

    The shares are padded to equal length; `valid_samples` tells how many of a share count.
    """
    transform = create_transform(
        data.input_size, is_training=False, interpolation=data.interpolation, mean=data.mean, std=data.std,
        crop_pct=data.crop_pct, crop_mode=data.crop_mode,
    )  # fmt: skip
    if isinstance(dataset, IterableDataset):
        dataset.set_loader_cfg(num_workers=workers)  # type: ignore[attr-defined]
        samples: Samples | StreamSamples = StreamSamples(
            dataset, transform, seed=None, rank=rank, batch_size=batch_size, give_up=max_bad
        )
        sampler = None
    else:
        samples = Samples(dataset, transform, mode=_mode(data), drop_unreadable=True, give_up=max_bad)
        sampler = OrderedDistributedSampler(dataset, world, rank)
    return Loader(samples, sampler, None, batch_size=batch_size, num_workers=workers, pin_memory=pin)


def valid_samples(loader: Loader) -> int | None:
    """How many samples of a validation share are not padding; ``None`` for a stream, where all count."""
    return loader.sampler.num_valid_samples if isinstance(loader.sampler, OrderedDistributedSampler) else None


def _cache(dataset: Any, cfg: TrainConfig, mode: str) -> DecodedCache | None:
    if cfg.cache_dir is None:
        return None
    if not hasattr(getattr(dataset, "reader", None), "__getitem__"):
        raise ConfigError(f"cache_dir keeps the images of folders and tables, the data set is {cfg.dataset!r}")
    source = {"dataset": cfg.dataset, "split": cfg.train_split, "images": len(dataset), "mode": mode}
    return DecodedCache(Path(cfg.cache_dir), cfg.cache_size, source)


def _mode(data: DataConfig) -> str:
    return "L" if data.input_size[0] == 1 else "RGB"


def _quiet_worker(_worker: int) -> None:
    """Leave stopping to the training process, which gets the same signals and ends its loaders in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
