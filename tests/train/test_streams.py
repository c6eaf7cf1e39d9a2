"""WebDataset shards and Hugging Face streams: the order, resuming in the middle, what cannot be read."""

from __future__ import annotations

import io
import json
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.train.processes import start
from tests.train.test_engine import losses, same, stop_after, weights
from visionattn.train import ConfigError, DataError, TrainConfig, train
from visionattn.train.data import NO_LABEL, Batch, DataConfig, Loader, open_dataset, train_loader, val_loader

pytest.importorskip("webdataset", reason="the data extra is not installed")
hub = pytest.importorskip("datasets", reason="the data extra is not installed")

Tiny = Callable[..., TrainConfig]
SMALL = DataConfig((3, 32, 32), "bilinear", (0.5,) * 3, (0.5,) * 3, 1.0, "center")
BROKEN = (5, 6, 13)  # training images that are no images: two in a row, and one in another shard


def picture(number: int) -> bytes:
    rng = np.random.default_rng(number)
    level = 60 if number % 2 else 190
    file = io.BytesIO()
    Image.fromarray(rng.integers(level - 50, level + 50, (16, 16, 3)).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def contents(split: str) -> list[tuple[str, bytes, int]]:
    count, base, broken = (36, 0, BROKEN) if split == "train" else (8, 100, (3,))
    return [(f"{split}{i:03d}", b"broken" if i in broken else picture(base + i), i % 2) for i in range(count)]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    root, info = tmp_path / "shards", {}
    root.mkdir()
    for split in ("train", "validation"):
        names, items = [], contents(split)
        for shard in range(4):
            names.append(f"{split}-{shard}.tar")
            with tarfile.open(root / names[-1], "w") as archive:
                for key, data, label in items[shard * len(items) // 4 : (shard + 1) * len(items) // 4]:
                    for ending, part in (("png", data), ("cls", str(label).encode())):
                        member = tarfile.TarInfo(f"{key}.{ending}")
                        member.size = len(part)
                        archive.addfile(member, io.BytesIO(part))
        info[split] = {"name": split, "num_samples": len(items), "filenames": names}
        info[split]["shard_lengths"] = [len(items) // 4] * 4
    (root / "_info.json").write_text(json.dumps({"splits": info}))
    return root


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "table"
    root.mkdir()
    features = hub.Features({"image": hub.Image(), "label": hub.ClassLabel(names=["light", "dark"])})
    for split in ("train", "validation"):
        items = contents(split)
        for shard in range(4):
            part = items[shard * len(items) // 4 : (shard + 1) * len(items) // 4]
            rows = {
                "image": [{"bytes": data, "path": f"{key}.png"} for key, data, _ in part],
                "label": [label for *_, label in part],
            }
            storage = {"image": {"bytes": hub.Value("binary"), "path": hub.Value("string")}, "label": features["label"]}
            hub.Dataset.from_dict(rows, features=hub.Features(storage)).cast(features).to_parquet(
                root / f"{split}-{shard:05d}-of-00004.parquet"
            )
    return root


@pytest.fixture(params=["wds", "hfids"])
def stream(request: pytest.FixtureRequest, tiny: Tiny) -> Callable[..., TrainConfig]:
    """Makes the configuration of a run on either kind of stream."""
    root = request.getfixturevalue("shards" if request.param == "wds" else "table")
    common: dict[str, Any] = {"train_num_samples": 36, "val_num_samples": 8, "num_classes": 2, "batch_size": 4}
    if request.param == "wds":
        common |= {"dataset": "wds/", "data_dir": str(root)}
    else:
        common |= {"dataset": f"hfids/{root}", "data_dir": None}
    return lambda **changes: tiny(**{**common, **changes})


def loader(cfg: TrainConfig, split: str = "train") -> Loader:
    dataset = open_dataset(
        cfg.dataset, cfg.data_dir, split, training=split == "train", num_samples=36 if split == "train" else 8,
        batch_size=cfg.batch_size, seed=cfg.seed,
    )  # fmt: skip
    if split == "train":
        return train_loader(dataset, cfg, SMALL, rank=0, world=1, pin=False)
    return val_loader(dataset, SMALL, batch_size=4, workers=cfg.workers, rank=0, world=1, pin=False, max_bad=10)


def equal(a: Batch, b: Batch) -> bool:
    assert a.images is not None
    assert b.images is not None
    return torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) and a.indices == b.indices


def test_a_stream_begins_at_any_batch(stream: Tiny) -> None:
    cfg = stream(aa="rand-m9-mstd0.5-inc1", reprob=0.5)
    whole = list(loader(cfg).epoch(1))
    assert len(whole) == 9
    other = loader(cfg)
    assert [name for batch in other.epoch(2) for name in batch.indices] != [name for b in whole for name in b.indices]
    for begin in (1, 4, len(whole)):
        rest = list(other.epoch(1, begin))
        assert len(rest) == len(whole) - begin
        assert all(equal(a, b) for a, b in zip(whole[begin:], rest, strict=True)), begin


def test_an_epoch_has_every_sample_and_names_what_it_cannot_read(stream: Tiny) -> None:
    batches = list(loader(stream()).epoch(0))
    read = {str(name).rpartition(":")[2].removesuffix(".png") for batch in batches for name in batch.indices}
    assert read == {f"train{i:03d}" for i in range(36) if i not in BROKEN}
    problems = [text for batch in batches for text in batch.unreadable]
    assert len(problems) == 3
    for number in BROKEN:
        assert sum(f"train{number:03d}" in text and "UnidentifiedImageError" in text for text in problems) == 1


def test_an_unreadable_validation_sample_does_not_count(stream: Tiny) -> None:
    batches = list(loader(stream(), "validation").epoch())
    assert [int(target) for batch in batches for target in batch.targets] == [0, 1, 0, NO_LABEL, 0, 1, 0, 1]
    (problem,) = (text for batch in batches for text in batch.unreadable)
    assert "validation003" in problem


def test_a_run_on_a_stream_resumes_to_the_bit(stream: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(stream(mixup=0.2, experiment="whole"))
    with monkeypatch.context() as patch:
        stop_after(12, patch)  # of nine an epoch
        train(stream(mixup=0.2, experiment="part"))
    with pytest.raises(ConfigError, match="workers 0 -> 2"):
        train(stream(mixup=0.2, experiment="part", resume="auto", workers=2))
    rest = train(stream(mixup=0.2, experiment="part", resume="auto"))
    assert losses(rest.history) == losses(whole.history)
    assert same(weights(rest.folder), weights(whole.folder))
    listed = (whole.folder / "unreadable.txt").read_text().splitlines()
    assert len(listed) == 4


def test_too_many_unreadable_samples_stop_the_run(stream: Tiny) -> None:
    with pytest.raises(DataError, match=r"3 images could not be read, more than max_bad_images \(2\)"):
        train(stream(max_bad_images=2))


def test_fewer_shards_than_loading_processes(shards: Path, tiny: Tiny) -> None:
    cfg = tiny(dataset="wds/", data_dir=str(shards), num_classes=2, batch_size=4, workers=5)
    with pytest.raises(DataError, match="4 shards for 5 loading processes"):
        list(loader(cfg).epoch(0))


@pytest.mark.slow
def test_loading_processes_resume_to_the_bit(stream: Tiny, tmp_path: Path) -> None:
    """In processes of their own: what Arrow has started in this one does not survive the fork of loading processes.

    At the end of a pass, `datasets` waits five seconds for Arrow's threads. Two samples fewer a loading process than
    there are, and an epoch ends within its first pass; that passes follow each other is seen in the other stream.
    """
    few = {} if stream().dataset == "wds/" else {"train_num_samples": 32}
    cfg = stream(workers=2, epochs=3, recovery_interval=1, experiment="whole", **few)
    whole = start(cfg, tmp_path / "whole.log")
    whole.join(600)
    assert whole.exitcode == 0, (tmp_path / "whole.log").read_text()
    cfg = stream(workers=2, epochs=3, recovery_interval=1, experiment="part", resume="auto", **few)
    folder = Path(cfg.output)
    part = start(cfg, tmp_path / "part.log")
    while not list((folder / "part" / "state").glob("update-*3.pt")):  # the third, the thirteenth, ...
        assert part.is_alive(), (tmp_path / "part.log").read_text()
        time.sleep(0.005)
    part.kill()
    part.join(600)
    rest = start(cfg, tmp_path / "rest.log")
    rest.join(600)
    assert rest.exitcode == 0, (tmp_path / "rest.log").read_text()
    assert "resumed after update" in (tmp_path / "rest.log").read_text()
    assert same(weights(folder / "part"), weights(folder / "whole"))


def test_a_cut_shard_is_reported(shards: Path, tiny: Tiny) -> None:
    cut = shards / "train-2.tar"
    cut.write_bytes(cut.read_bytes()[:6000])
    cfg = tiny(dataset="wds/", data_dir=str(shards), num_classes=2, batch_size=4)
    problems = [text for batch in loader(cfg).epoch(0) for text in batch.unreadable]
    assert any(str(cut) in text and text.startswith("a shard") for text in problems), problems
