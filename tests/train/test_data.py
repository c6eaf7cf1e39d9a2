"""Data sets, their errors, unreadable images, and the order that follows from the seed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visionattn.train import ConfigError, DataError, TrainConfig, train
from visionattn.train.data import (
    NO_LABEL,
    DataConfig,
    EpochSampler,
    Loader,
    class_names,
    open_dataset,
    train_loader,
    val_loader,
)
from visionattn.train.digits import Digits
from visionattn.train.errors import MissingDependencyError, require

SMALL = DataConfig((3, 32, 32), "bilinear", (0.5,) * 3, (0.5,) * 3, 1.0, "center")


def loader(cfg: TrainConfig, world: int = 1, rank: int = 0) -> Loader:
    dataset = open_dataset(cfg.dataset, cfg.data_dir, "train", training=True)
    return train_loader(dataset, cfg, SMALL, rank=rank, world=world, pin=False)


def test_digits_split_is_fixed_and_stratified() -> None:
    sets = {split: Digits(split) for split in ("train", "validation")}
    assert {split: len(digits) for split, digits in sets.items()} == {"train": 1433, "validation": 364}
    share = [np.bincount(digits.labels, minlength=10) / len(digits) for digits in sets.values()]
    assert np.abs(share[0] - share[1]).max() < 0.01
    assert np.array_equal(Digits("validation").pixels, sets["validation"].pixels)
    image, label = sets["train"][0]
    assert (image.size, image.mode, image.getextrema()[0][1], label) == ((8, 8), "RGB", 255, 0)
    assert class_names(sets["train"]) == tuple("0123456789")


def test_missing_and_empty_folders(images: Path, tmp_path: Path) -> None:
    def error(root: Path | None, split: str = "train") -> str:
        with pytest.raises(DataError) as caught:
            open_dataset("", str(root) if root else None, split, training=True)
        return str(caught.value)

    assert "give --data-dir" in error(None)
    assert f"the folder {tmp_path / 'nowhere'} does not exist" in error(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "looked for train/, training/, found no folders" in error(tmp_path / "empty")
    assert "looked for test/, found train, val" in error(images, "test")
    (tmp_path / "empty" / "train").mkdir()
    assert "holds no class folders" in error(tmp_path / "empty")
    (tmp_path / "empty" / "train" / "cat").mkdir()
    assert "Found 0 images" in error(tmp_path / "empty")
    shutil.rmtree(images / "train")
    assert "looked for train/, training/, found val" in error(images)


def test_validation_folder_goes_by_any_usual_name(images: Path) -> None:
    assert len(open_dataset("", str(images), "validation", training=False)) == 8
    (images / "val").rename(images / "test")
    assert len(open_dataset("", str(images), "validation", training=False)) == 8
    assert class_names(open_dataset("", str(images / "test"), ".", training=False)) == ("dark", "light")


def test_classes_must_match(images: Path, tiny: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ConfigError, match="has 2 classes, num_classes is 1"):
        train(tiny(num_classes=1))
    shutil.rmtree(images / "val" / "dark")  # light keeps its label 1
    assert train(tiny(epochs=1, experiment="fewer", lr=1e-9)).history[0]["eval_top5"] == 100
    (images / "val" / "purple").mkdir()
    with pytest.raises(DataError, match="class folders that the training set lacks: purple"):
        train(tiny(experiment="other"))


def test_fewer_images_than_a_batch(tiny: Callable[..., TrainConfig]) -> None:
    with pytest.raises(DataError, match=r"24 images, fewer than one update takes \(16 x 2 accumulated x 1"):
        train(tiny(batch_size=16, grad_accum_steps=2))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [("torch/cifar10", DataError, "not found"), ("torch/nothing", DataError, "Unknown torchvision dataset")],
)
def test_unknown_datasets(name: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        open_dataset(name, str(tmp_path), "train", training=True)


def test_a_missing_package_names_what_to_install() -> None:
    with pytest.raises(
        MissingDependencyError, match=r"the oracle needs the package 'no_such_module': pip install 'x\[y\]'"
    ):
        require("no_such_module.part", "the oracle", "x[y]")


def test_order_follows_from_seed_and_epoch_alone() -> None:
    def order(epoch: int, seed: int = 0, rank: int = 0, world: int = 1, start: int = 0) -> list[tuple[int, int]]:
        sampler = EpochSampler(48, seed=seed, rank=rank, world=world, repeats=0, multiple=4)
        sampler.set_epoch(epoch, start)
        return list(sampler)

    assert order(0) == order(0)
    assert sorted(index for index, _ in order(0)) == list(range(48))
    assert order(0) != order(1)
    assert order(1) != order(0, seed=1)
    assert order(0, start=20) == order(0)[20:]
    both = [order(3, rank=rank, world=2) for rank in (0, 1)]
    assert [key for pair in zip(*both, strict=True) for key in pair] == order(3)


def test_repeated_augmentation_repeats_images_but_not_seeds() -> None:
    sampler = EpochSampler(30, seed=0, rank=0, world=1, repeats=3, multiple=1)
    sampler.set_epoch(0)
    indices, seeds = zip(*sampler, strict=True)
    assert len(indices) == 30
    assert len(set(indices)) == 10
    assert len(set(seeds)) == 30


@pytest.mark.slow
def test_batches_do_not_depend_on_the_number_of_workers_or_the_start(tiny: Callable[..., TrainConfig]) -> None:
    changes = {"aa": "rand-m9-mstd0.5-inc1", "reprob": 0.5}
    alone = [loader(tiny(**changes)) for _ in range(2)]
    shared = loader(tiny(**changes, workers=2))
    list(alone[0].epoch(0))
    for other, start in ((alone[1], 0), (shared, 0), (shared, 2)):
        for batch, same in zip(list(alone[0].epoch(1))[start:], other.epoch(1, start), strict=True):
            assert batch.images is not None
            assert torch.equal(batch.images, same.images)
            assert torch.equal(batch.targets, same.targets)
            assert batch.indices == same.indices


def test_an_unreadable_image_is_replaced_and_reported(
    images: Path, tiny: Callable[..., TrainConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (images / "train" / "dark" / "3.png").read_bytes()
    (images / "train" / "dark" / "3.png").write_bytes(whole[:200])
    (images / "val" / "light" / "1.png").write_text("not an image")
    result = train(tiny(progress=True))
    assert len(result.history) == 2
    shown = capsys.readouterr().out
    assert shown.count("skipped an unreadable image: ") == 1
    assert "2 unreadable images so far" in shown
    listed = (result.folder / "unreadable.txt").read_text()
    assert str(images / "train" / "dark" / "3.png") in listed
    assert str(images / "val" / "light" / "1.png") in listed


def test_an_unreadable_validation_image_does_not_count(images: Path) -> None:
    (images / "val" / "light" / "1.png").write_bytes(b"")
    dataset = open_dataset("", str(images), "validation", training=False)
    batches = val_loader(dataset, SMALL, batch_size=8, workers=0, rank=0, world=1, pin=False, max_bad=5)
    (batch,) = batches.epoch()
    assert (batch.targets == NO_LABEL).tolist() == [False] * 5 + [True] + [False] * 2
    assert len(batch.unreadable) == 1


def test_too_many_unreadable_images_stop_the_run(images: Path, tiny: Callable[..., TrainConfig]) -> None:
    for file in list((images / "train").glob("*/*.png"))[:5]:
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"3 images could not be read, more than max_bad_images \(2\)"):
        train(tiny(max_bad_images=2))
    for file in (images / "train").glob("*/*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="more than max_bad_images"):
        train(tiny(max_bad_images=10, experiment="all"))


def test_a_cache_keeps_what_was_decoded(images: Path, tiny: Callable[..., TrainConfig], tmp_path: Path) -> None:
    large = images / "train" / "dark" / "3.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8)).save(large)
    plain = [batch.images for batch in loader(tiny()).epoch(0)]
    cfg = tiny(cache_dir=str(tmp_path / "cache"), cache_size=20)
    first = [batch.images for batch in loader(cfg).epoch(0)]
    assert sum(not torch.equal(a, b) for a, b in zip(plain, first, strict=True)) == 1  # the batch of the large one
    kept = sorted((tmp_path / "cache").glob("*/*.npy"))
    assert len(kept) == 24
    assert sorted({np.load(file).shape for file in kept}) == [(16, 16, 3), (20, 30, 3)]
    kept[5].write_bytes(b"damaged")
    for file in images.glob("train/*/*.png"):
        if file.name != "5.png":
            file.write_bytes(b"not read any more")
    again = list(loader(cfg).epoch(0))
    assert not any(batch.unreadable for batch in again)
    assert all(torch.equal(a, b.images) for a, b in zip(first, again, strict=True))
    with pytest.raises(ConfigError, match="name another folder"):
        loader(tiny(cache_dir=str(tmp_path / "cache"), cache_size=30))
    with pytest.raises(ConfigError, match="keeps the images of folders and tables"):
        loader(tiny(dataset="digits", data_dir=None, cache_dir=str(tmp_path / "other")))
