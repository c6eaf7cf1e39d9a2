"""Evaluation of checkpoints: our own, which know everything, and others, which need telling."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from visionattn.train import CheckpointError, ConfigError, DataError, TrainConfig, ValidateConfig, train, validate

REPOSITORY = Path(__file__).parents[2]
Tiny = Callable[..., TrainConfig]


def check(**values: Any) -> dict[str, Any]:
    return validate(ValidateConfig(**{"workers": 0, "progress": False, **values}))


def test_a_checkpoint_is_enough(tiny: Tiny, tmp_path: Path) -> None:
    result = train(tiny(epochs=3, crop_pct=0.8, mean=(0.4,), interpolation="bilinear"))
    row = result.history[-1]
    found = check(checkpoint=str(result.folder / "last.safetensors"), results_file=str(tmp_path / "a.json"))
    assert found["top1"] == pytest.approx(row["eval_top1"])
    assert found["loss"] == pytest.approx(row["eval_loss"], rel=1e-5)
    assert (found["samples"], found["mean"], found["crop_pct"]) == (8, [0.4] * 3, 0.8)
    assert json.loads((tmp_path / "a.json").read_text()) == found
    check(checkpoint=str(result.folder / "last.safetensors"), results_file=str(tmp_path / "a.csv"), batch_size=3)
    (line,) = csv.DictReader((tmp_path / "a.csv").open())
    assert float(line["top1"]) == pytest.approx(row["eval_top1"])
    larger = check(checkpoint=str(result.folder / "last.safetensors"), img_size=48, split="train")
    assert (larger["input_size"], larger["samples"]) == ([3, 48, 48], 24)


def test_a_checkpoint_of_others_needs_the_model(tiny: Tiny, images: Path, tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=2)
    torch.save({"model": {f"module.{key}": value for key, value in model.state_dict().items()}}, tmp_path / "x.pth")
    found = check(
        model="test_resnet", num_classes=2, checkpoint=str(tmp_path / "x.pth"), data_dir=str(images), img_size=32
    )
    assert found["samples"] == 8
    with pytest.raises(ConfigError, match="does not say which model"):
        check(checkpoint=str(tmp_path / "x.pth"))
    with pytest.raises(CheckpointError, match="classifies 2 classes, the model 5"):
        check(model="test_resnet", num_classes=5, checkpoint=str(tmp_path / "x.pth"), data_dir=str(images))
    with pytest.raises(CheckpointError, match="does not fit"):
        check(model="test_vit", num_classes=2, checkpoint=str(tmp_path / "x.pth"), data_dir=str(images))
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        check(checkpoint=str(tmp_path / "nothing.safetensors"))


def test_data_must_have_the_checkpoints_classes(tiny: Tiny, images: Path) -> None:
    result = train(tiny(epochs=1))
    (images / "val" / "purple").mkdir()
    with pytest.raises(DataError, match="class folders that the checkpoint lacks: purple"):
        check(checkpoint=str(result.folder / "last.safetensors"))
    with pytest.raises(ConfigError, match="has 10 classes, the model 2"):
        check(checkpoint=str(result.folder / "last.safetensors"), dataset="digits")


@pytest.mark.slow
def test_the_command_lines_on_digits(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=REPOSITORY, check=False)

    out = ("--output", str(tmp_path), "--experiment", "digits")
    trained = run(
        "tools/train.py", "configs/digits/biformer_t.yaml", *out, "--epochs", "2", "--warmup-epochs", "0", "--img-size",
        "32", "--model-kwargs", "n_win=2", "dims=[16,32,32,32]", "head_dim=16", "depths=[1,1,1,1]", "--lr", "3e-3",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert "epoch   2/2" in trained.stdout
    validated = run("tools/validate.py", "--checkpoint", str(tmp_path / "digits" / "model_best.safetensors"))
    assert validated.returncode == 0, validated.stderr
    assert "biformer_t on digits (validation, 364 images): top1 " in validated.stdout
    top1 = float(validated.stdout.partition("top1 ")[2].partition(" %")[0])
    assert top1 > 30  # chance is 10
    wrong = run("tools/train.py", "configs/digits/biformer_t.yaml", *out, "--epoch", "3")
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert wrong.stderr == "error: unknown argument: 'epoch'; did you mean epochs?\n"
