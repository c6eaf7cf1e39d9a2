"""ImageNet's sets: label maps, restricted answers, reassessed labels, one table that continues."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from visionattn.train import CheckpointError, ConfigError, DataError, ValidateConfig, validate_table
from visionattn.train import table as table_module
from visionattn.train.benchmarks import open_benchmarks, real_labels, synsets
from visionattn.train.evaluate import _sums

SYNSETS = synsets("imagenet")


def write(folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True)
    for name in names:
        rng = np.random.default_rng(len(name))
        Image.fromarray(rng.integers(0, 255, (32, 32, 3)).astype(np.uint8)).save(folder / f"{name}.JPEG")


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, str]:
    root = tmp_path / "sets"
    for label, number in ((0, 293), (0, 2138), (388, 10)):
        folder = root / "imagenet" / "val" / SYNSETS[label]
        if not folder.exists():
            folder.mkdir(parents=True)
        Image.new("RGB", (32, 32), (number % 255, 9, 9)).save(folder / f"ILSVRC2012_val_{number:08d}.JPEG")
    write(root / "v2" / "10", ["x"])
    write(root / "v2" / "9", ["x"])
    own = synsets("imagenet_a")
    write(root / "a" / own[3], ["x"])
    write(root / "c" / "weather" / "fog" / "1" / SYNSETS[5], ["x"])
    write(root / "c" / "weather" / "fog" / "5" / SYNSETS[5], ["x"])
    found = {name: str(root / name) for name in ("imagenet", "v2", "a", "c")}
    return {**found, "real": found["imagenet"]}


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[str]:
    files = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = timm.create_model("test_resnet")
        files.append(str(tmp_path / f"{seed}.pth"))
        torch.save(model.state_dict(), files[-1])
    return files


def config(**values: Any) -> ValidateConfig:
    common: dict[str, Any] = {"model": "test_resnet", "workers": 0, "progress": False, "img_size": 32, "batch_size": 4}
    return ValidateConfig(**{**common, **values})


def test_labels_of_the_sets(sets: dict[str, str]) -> None:
    found = {benchmark.name: benchmark for benchmark in open_benchmarks(sets)}
    assert list(found) == ["imagenet", "v2", "a", "c/weather/fog/1", "c/weather/fog/5", "real"]
    assert found["v2"].class_map["10"] == 10  # not the second in the order of the alphabet
    assert found["imagenet"].class_map[SYNSETS[388]] == 388
    columns = found["a"].columns
    assert columns is not None
    assert len(columns) == 200
    assert [SYNSETS[label] for label in columns] == synsets("imagenet_a")
    assert found["real"].real
    assert found["real"].folder == found["imagenet"].folder
    with pytest.raises(ConfigError, match="unknown set imagenett; known: imagenet, real"):
        open_benchmarks({"imagenett": "."})
    with pytest.raises(DataError, match="is no folder"):
        open_benchmarks({"r": "nowhere"})


def test_answers_among_fewer_labels() -> None:
    logits = torch.tensor([[9.0, 1.0, 0.0, 2.0], [9.0, 3.0, 0.0, 2.0]])
    loss, first, five, count = _sums(logits, torch.tensor([3, 3]), (1, 3), None).tolist()
    assert (first, five, count) == (1, 2, 2)
    wanted = torch.nn.functional.cross_entropy(logits[:, [1, 3]], torch.tensor([1, 1]), reduction="sum")
    assert loss == pytest.approx(float(wanted))


def test_reassessed_labels() -> None:
    logits = torch.tensor(
        [[5.0, 4, 0, 0, 0, 0, 1], [5, 4, 3, 2, 1, 0, 0], [0, 0, 0, 0, 0, 0, 9], [1, 0, 0, 0, 0, 0, 0]]
    )
    right = torch.zeros(4, 7, dtype=torch.bool)
    right[0, [0, 6]] = right[1, 4] = right[2, 5] = True  # the last has no label at all
    _, first, _, count = _sums(logits, torch.tensor([1, 1, 1, 1]), None, right).tolist()
    assert (first, count) == (1, 3)
    labels = real_labels(["a/ILSVRC2012_val_00000002.JPEG", "ILSVRC2012_val_00000001.JPEG"], 1000)
    assert labels.shape == (2, 1000)
    assert labels[0].nonzero().flatten().tolist() == [795, 970]
    assert labels[1].nonzero().flatten().tolist() == []
    with pytest.raises(DataError, match="no validation image of ImageNet"):
        real_labels(["ILSVRC2012_val_00050001.JPEG"], 1000)


@pytest.mark.parametrize("ending", [".json", ".csv", ".md"])
def test_a_table_grows_and_continues(
    ending: str, sets: dict[str, str], checkpoints: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"table{ending}"
    done: list[str] = []
    evaluate = table_module._evaluate

    def counting(subject: Any, benchmark: Any) -> dict[str, Any]:
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(benchmark.name)
        return evaluate(subject, benchmark)

    monkeypatch.setattr(table_module, "_evaluate", counting)
    cfg = config(checkpoints=tuple(checkpoints), sets=sets, results_file=str(file))
    with pytest.raises(KeyboardInterrupt):
        validate_table(cfg)
    assert len(done) == 7
    done.clear()
    rows = validate_table(cfg)
    assert len(done) == 5  # of two times six
    assert len(rows) == 12
    done.clear()
    assert [str(row["top1"]) for row in validate_table(cfg)] == [str(row["top1"]) for row in rows]
    assert not done
    beside = file.with_suffix(".json") if ending == ".md" else file
    text = beside.read_text()
    read = json.loads(text) if beside.suffix == ".json" else list(csv.DictReader(text.splitlines()))
    assert [row["set"] for row in read] == [row["set"] for row in rows]
    if ending == ".md":
        lines = file.read_text().splitlines()
        assert lines[0] == "| model | size | imagenet | v2 | a | c | real |"
        assert len(lines) == 4
    model = timm.create_model("test_resnet")  # other weights under the same name are evaluated anew
    torch.save(model.state_dict(), checkpoints[0])
    validate_table(cfg)
    assert len(done) == 6


def test_what_a_table_needs(sets: dict[str, str], checkpoints: list[str]) -> None:
    with pytest.raises(ConfigError, match="say on which --sets"):
        config(checkpoints=tuple(checkpoints))
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        validate_table(config(checkpoints=("nowhere.pth",), sets=sets))
    Path(sets["a"], "n00000000").mkdir()
    with pytest.raises(DataError, match="has class folders that ImageNet lacks: n00000000"):
        validate_table(config(checkpoints=tuple(checkpoints), sets={"a": sets["a"]}))
