"""Weights that say what they are, files that are whole or not there."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import safetensors.torch
import timm
import torch

from visionattn.train import CheckpointError, TrainConfig, load_model, read_info, train
from visionattn.train.checkpoint import StateStore, load_weights, read_state
from visionattn.train.files import write_atomically


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "weights"
    target.write_text("old")

    def half(file: IO[bytes]) -> None:
        file.write(b"new, and")
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left on device; files written before are intact"):
        write_atomically(target, half)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_weights_rebuild_their_model(tiny: Callable[..., TrainConfig]) -> None:
    result = train(tiny(model_kwargs={"drop_rate": 0.1}))
    model, info = load_model(result.folder / "last.safetensors")
    assert (info.model, info.model_kwargs, info.num_classes) == ("test_resnet", {"drop_rate": 0.1}, 2)
    assert (info.class_names, info.input_size, info.epoch) == (["dark", "light"], [3, 32, 32], 1)
    assert info.metrics["top1"] == result.history[-1]["eval_top1"]
    plain = timm.create_model("test_resnet", num_classes=2, checkpoint_path=str(result.folder / "last.safetensors"))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), plain.eval()(x))


def test_wrong_weights(tiny: Callable[..., TrainConfig], tmp_path: Path) -> None:
    path = train(tiny(epochs=1)).folder / "last.safetensors"
    with pytest.raises(CheckpointError, match="does not fit"):
        load_weights(timm.create_model("test_vit"), path)
    with pytest.raises(CheckpointError, match="classifies 2 classes, the model 7"):
        load_weights(timm.create_model("test_resnet", num_classes=7), path)
    with pytest.raises(CheckpointError, match="no weight file"):
        load_weights(timm.create_model("test_resnet"), tmp_path / "nothing.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        read_info(cut)
    bare = tmp_path / "bare.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, bare)
    assert read_info(bare) is None
    with pytest.raises(CheckpointError, match="does not say which model"):
        load_model(bare)


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("executed", "w"))


def test_no_pickled_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, write in (
        ("zip.pth", lambda path: torch.save({"update": 1, "x": _Code()}, path)),
        ("plain.pth", lambda path: path.write_bytes(pickle.dumps({"update": 1, "x": _Code()}))),
    ):
        write(tmp_path / name)
        with pytest.raises(CheckpointError):
            read_state(tmp_path / name)
        with pytest.raises(CheckpointError, match=name):
            load_weights(timm.create_model("test_resnet"), tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_the_newest_intact_state_is_read(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "state")
    reports: list[str] = []
    assert store.newest(reports.append) is None
    for update in (5, 10, 15):
        store.save({"update": update, "x": torch.arange(1000)}, update)
    assert [file.name for file in store.files()] == ["update-000000015.pt", "update-000000010.pt"]
    newest = store.files()[0]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    newest.write_bytes(data)
    state = store.newest(reports.append)
    assert state is not None
    assert state["update"] == 10
    assert len(reports) == 1
    assert "update-000000015.pt cannot be read" in reports[0]
    store.files()[1].write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of the 2 states"):
        store.newest(reports.append)
