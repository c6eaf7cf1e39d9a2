import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from tests.analysis.test_export import run_tool
from visionattn.analysis import quantization_study as study
from visionattn.analysis import quantize
from visionattn.train.checkpoint import WeightsInfo, save_weights

ARCH = {"dim": 16, "num_heads": 2, "depth": 1, "patch_size": 8, "img_size": 32, "gate": "none", "global_pool": "avg"}


@pytest.fixture
def data(tmp_path) -> Path:
    """Two classes of 24 x 24 images, dark and bright, for training and validation."""
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, level in (("bright", 160), ("dark", 0)):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for i in range(6):
                pixels = draw.integers(level, level + 90, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A model of two classes as training here leaves it, whose classes are not in alphabetical order."""
    torch.manual_seed(0)
    model = timm.create_model("gated_vit_s16", num_classes=2, **ARCH)
    info = WeightsInfo(
        model="gated_vit_s16", model_kwargs=ARCH, num_classes=2, in_chans=3, class_names=["dark", "bright"],
        input_size=[3, 32, 32], interpolation="bicubic", mean=[0.5] * 3, std=[0.25] * 3, crop_pct=1.0,
        crop_mode="center", dataset="", val_split="validation", weights="raw", epoch=4, metrics={}, version="0",
    )  # fmt: skip
    save_weights(tmp_path / "run" / "last.safetensors", model.state_dict(), info)
    return tmp_path / "run" / "last.safetensors"


def test_accuracy_is_counted_as_by_hand() -> None:
    def run(x: Tensor) -> Tensor:  # guesses the classes x, x + 1, ... in that order
        return -((torch.arange(8)[None] - x[:, None]) % 8).float()

    labels = torch.tensor([3, 3, 4, 3])
    found = quantize.accuracy(run, [(torch.tensor([3, 3]), labels[:2]), (torch.tensor([2, 5]), labels[2:])])
    assert found == quantize.Accuracy(top1=50.0, top5=75.0, images=4)  # ranks 1, 1, 3 and 7
    with pytest.raises(ValueError, match="a label 8, the model has 8 classes"):
        quantize.accuracy(run, [(torch.tensor([1]), torch.tensor([8]))])


def test_labels_follow_the_models_classes(data) -> None:
    def labels(**kwargs: object) -> list[int]:
        def transform(image: Image.Image) -> Tensor:
            return torch.tensor(float(np.asarray(image).mean() > 128))

        batches: Iterator[tuple[Tensor, Tensor]] = quantize.labelled(data, transform, batch=5, **kwargs)
        pairs = [(int(x), int(y)) for xs, ys in batches for x, y in zip(xs, ys, strict=True)]
        assert len(pairs) == 12
        (of_bright,) = {y for x, y in pairs if x == 1}
        (of_dark,) = {y for x, y in pairs if x == 0}
        return [of_dark, of_bright]

    assert labels() == [1, 0]  # alphabetical
    assert labels(classes=["dark", "bright"]) == [0, 1]
    empty = data.parent / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"no labelled images in .*expected a folder for each class"):
        list(quantize.labelled(empty, lambda x: x))


def test_images_are_spread_over_a_folder(data) -> None:
    images = quantize.Images(data, lambda image: torch.tensor(image.size), count=4)
    assert [p.parent.name for p in images.files] == ["bright", "dark", "bright", "dark"]
    assert len(quantize.Images(data, lambda image: torch.zeros(1))) == 24
    assert [len(batch) for batch in images.batches(3)] == [3, 1]
    with pytest.raises(ValueError, match="no images in"):
        quantize.Images(data / "none", lambda image: torch.zeros(1))


def test_an_8_bit_version_from_the_command_line(data, checkpoint, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "model.onnx"
    code = run_tool(
        "export.py", "gated_vit_s16", "--format", "onnx", "--checkpoint", checkpoint, "--out", out, "--int8",
        "--calibration", data / "train", "--calibration-images", 8, "--eval", data, monkeypatch=monkeypatch,
    )  # fmt: skip
    assert code == 0, capsys.readouterr().err
    assert {p.name for p in tmp_path.glob("model*")} == {"model.onnx", "model.int8.onnx", "model.int8.json"}
    report = json.loads((tmp_path / "model.int8.json").read_text())
    assert report["calibration_images"] == 8
    assert report["before"]["images"] == report["after"]["images"] == 12
    assert report["megabytes"] < report["megabytes_before"]
    assert report["machine"]["torch"] == torch.__version__
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.5
    x[::2] += 1  # bright and dark in turn
    x[1::2] -= 1
    small, whole = (quantize.session(tmp_path / name)(x) for name in ("model.int8.onnx", "model.onnx"))
    assert 0 < (small - whole).abs().max() < 0.2 * (whole[0] - whole[1]).abs().max()


def test_what_is_missing_for_8_bits_is_said(data, checkpoint, tmp_path, monkeypatch, capsys) -> None:
    arguments = ["export.py", "gated_vit_s16", "--out", tmp_path / "m", "--format"]
    assert run_tool(*arguments, "pt2", "--int8", monkeypatch=monkeypatch) == 2
    assert "--int8 takes --format onnx and --calibration" in capsys.readouterr().err
    assert run_tool(*arguments, "onnx", "--eval", data, monkeypatch=monkeypatch) == 2
    assert "are for --int8" in capsys.readouterr().err
    other = ["export.py", "biformer_t", "--out", tmp_path / "m", "--format", "pt2", "--checkpoint", checkpoint]
    assert run_tool(*other, monkeypatch=monkeypatch) == 1
    assert "holds the weights of gated_vit_s16, not of biformer_t" in capsys.readouterr().err
    assert not list(tmp_path.glob("m*"))


def test_the_study_has_a_row_for_a_trained_model(data, checkpoint, tmp_path) -> None:
    row = study.examine(checkpoint, data, calibration_images=4)
    assert {"attention": "softmax", "epochs": 5, "images": 12, "calibration_images": 4}.items() <= row.items()
    assert row["max_infinity_norm"] > 0
    assert 1 < row["mean_kurtosis"] <= row["max_kurtosis"]
    study.write(tmp_path / "study.json", [row], checkpoint)
    assert json.loads((tmp_path / "study.json").read_text())["rows"] == [row]
    lines = list(study.table([{**row, "fp32": 50.0, "int8": 49.25, "int8_per_tensor": 50.5}]))
    assert lines[2].startswith("| softmax | 50.00 | 49.25 (-0.75) | 50.50 (+0.50) | ")


def test_the_study_names_what_models_differ_in() -> None:
    def name(model: str, **kwargs: object) -> str:
        return study.attention({"model": model, "model_kwargs": kwargs})

    assert name("clipped_vit_s16", alpha=0.6) == name("gated_vit_s16", clip=[-0.1, 1], gate="none") == "clipped"
    assert name("gated_vit_s16", gate="none") == "softmax"
    assert name("gated_vit_s16", gate="linear") == name("gated_vit_s16") == "gated"
