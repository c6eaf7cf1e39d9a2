"""Folders of images: what is written, kept, skipped and refused."""

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from tests.analysis.test_page import picture
from tests.models.variants import TINY
from visionattn.analysis import image_sources
from visionattn.train.checkpoint import WeightsInfo, save_weights

ROOT = Path(__file__).parents[2]
CONFIG = {
    "input_size": (3, 64, 64),
    "mean": (0.5,) * 3,
    "std": (0.25,) * 3,
    "crop_pct": 1.0,
    "interpolation": "bilinear",
}


def tool() -> Any:
    spec = importlib.util.spec_from_file_location("visualize_tool", ROOT / "tools" / "visualize.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    monkeypatch.setattr(sys, "argv", ["visualize.py", *map(str, argv)])
    return tool().main()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    picture(80, 100).save(folder / "a.png")
    picture(50, 40).convert("L").save(folder / "more" / "b.JPEG")
    (folder / "c.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture either")
    return folder


def model_arguments(family: str) -> list[object]:
    name, kwargs = TINY[family]
    return [name, "--size", 64, "--num-classes", 5, "--model-kwargs", *(f"{k}={v!r}" for k, v in kwargs.items())]


def test_a_folder_becomes_pages_and_pictures(photos, tmp_path, monkeypatch, capsys) -> None:
    name, kwargs = TINY["agent_pvt"]
    torch.manual_seed(0)
    torch.save(timm.create_model(name, num_classes=5, **kwargs).state_dict(), tmp_path / "weights.pth")
    names = tmp_path / "names.txt"
    names.write_text("\n".join(["ant", "bee", "cat", "dog", "elk"]))
    argv = [*model_arguments("agent_pvt"), "--checkpoint", tmp_path / "weights.pth", "--class-names", names]
    out = tmp_path / "out"
    assert run(monkeypatch, *argv, "--image", photos, "--out", out) == 0
    said = capsys.readouterr()
    assert re.search(r"skipped c: cannot identify image file", said.err)
    assert said.err.count("skipped") == 1
    assert f"wrote 2 pages to {out}, skipped 1" in said.out
    pages = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    methods = ("attention", "features", "gradcam")  # rollout is not defined for pyramids
    assert pages == {
        "a.html", "more/b.html", "erf.png", "overview.png",
        *(f"{stem}.{method}.png" for stem in ("a", "more/b") for method in methods),
    }  # fmt: skip
    for path in out.rglob("*.png"):
        with Image.open(path) as drawn:
            assert min(drawn.size) > 200, path
    text = (out / "a.html").read_text()
    assert "weights: weights.pth" in text
    assert any(f'["{animal}",' in text for animal in ("ant", "bee", "cat", "dog", "elk"))

    (out / "a.html").write_text("mine")
    (out / "erf.png").write_bytes(b"mine")
    (out / "more" / "b.html").unlink()
    assert run(monkeypatch, *argv, "--image", photos, "--out", out) == 0
    assert "wrote 1 pages" in capsys.readouterr().out
    assert (out / "a.html").read_text() == "mine"
    assert (out / "erf.png").read_bytes() == b"mine"
    assert (
        run(monkeypatch, *argv, "--image", photos / "a.png", "--out", out, "--overwrite", "--methods", "gradcam") == 0
    )
    assert (out / "a.html").read_text() != "mine"
    assert "Not asked for." in (out / "a.html").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["biformer_x"], "unknown model 'biformer_x'; did you mean biformer_"),
        ([], "give the model's name, or a --checkpoint"),
        (["test_vit"], "give --image, a file or a folder"),
        (["test_vit", "--image", "nowhere.jpg"], "no image at nowhere.jpg"),
        (["test_vit", "--image", "."], "no images in the folder ."),
        (["test_vit", "--checkpoint", "nowhere.pth", "--image", "x.png"], "no checkpoint at nowhere.pth"),
        (["test_vit", "--checkpoint", "other.pth", "--image", "x.png"], "other.pth does not fit VisionTransformer"),
        (
            ["test_vit", "--image", "x.png", "--size", "1", "2", "3"],
            "--size takes a side, or height and width; got 1 2 3",
        ),
        (
            ["test_vit", "--image", "x.png", "--size", "64", "--model-kwargs", "dynamic_img_size=False"],
            "test_vit does not take images of 64 x 64",
        ),
        (["test_vit", "--image", "x.png", "--methods", "magic"], "unknown method magic; there are attention"),
        (
            ["test_vit", "--image", "x.png", "--layer", "b.0"],
            "no attention layer is named 'b.0'; there are blocks.0.attn",
        ),
        (["test_vit", "--image", "x.png", "--cam-layer", "b.0"], "VisionTransformer has no layer 'b.0'"),
        (["test_vit", "--image", "x.png", "--target", "1000"], "class 1000 does not exist; the model has 1000"),
        (["test_vit", "--image", "x.png", "--model-kwargs", "depth"], "--model-kwargs takes KEY=VALUE, got 'depth'"),
    ],
)
def test_errors_are_one_clear_line(argv, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    if "." not in argv:
        picture().save("x.png")
    torch.save({"weight": torch.zeros(3)}, "other.pth")
    assert run(monkeypatch, *argv) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.rglob("*.html"))


def test_a_checkpoint_of_training_brings_images_of_its_own(tmp_path, monkeypatch, capsys) -> None:
    name, kwargs = TINY["gated_vit"]
    info = WeightsInfo(
        model=name, model_kwargs=kwargs, num_classes=10, in_chans=3, class_names=[f"digit{i}" for i in range(10)],
        input_size=[3, 64, 64], interpolation="bilinear", mean=[0.5] * 3, std=[0.25] * 3,
        crop_pct=1.0, crop_mode="center", dataset="digits", val_split="validation", weights="raw", epoch=0, metrics={},
        version="0",
    )  # fmt: skip
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs)
    save_weights(tmp_path / "model_best.safetensors", model.state_dict(), info)
    argv = ["--checkpoint", tmp_path / "model_best.safetensors", "--out", tmp_path / "out", "--samples", 2]
    assert run(monkeypatch, *argv, "--methods", "attention", "rollout") == 0
    pages = sorted((tmp_path / "out").glob("*.html"))
    assert [re.sub(r"\d$", "", p.stem) for p in pages] == ["00-digit", "01-digit"]
    text = pages[0].read_text()
    assert '["digit' in text
    assert "weights: model_best.safetensors" in text
    assert run(monkeypatch, "vit_tiny_patch16_224", *argv) == 1
    assert "is of gated_vit_s16, not of vit_tiny_patch16_224: leave the model out" in capsys.readouterr().err


def test_no_readable_image_is_a_failure(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert run(monkeypatch, "test_vit", "--image", tmp_path / "broken.png", "--out", tmp_path / "out") == 1
    assert "wrote 0 pages" in capsys.readouterr().out


def test_sources_have_names_of_their_own(tmp_path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder / "sub").mkdir(parents=True)
        picture(20, 20).save(tmp_path / folder / "a.png")
    picture(20, 20).save(tmp_path / "x" / "a.jpg")
    picture(20, 20).save(tmp_path / "x" / "sub" / "b.png")
    assert [s.name for s in image_sources([tmp_path / "x"], CONFIG)] == ["a.jpg", "a.png", "sub/b"]
    both = image_sources([tmp_path / "x", tmp_path / "y"], CONFIG)
    assert len({s.name for s in both}) == 4
    x, shown = image_sources([tmp_path / "y"], CONFIG)[0].load()
    assert x.shape == (1, 3, 64, 64)
    assert shown.size == (640, 640)
    small = torch.nn.functional.avg_pool2d(
        torch.tensor(list(shown.tobytes())).view(640, 640, 3).permute(2, 0, 1) / 255.0, 10
    )
    assert (x[0] * 0.25 + 0.5 - small).abs().mean() < 0.02  # the same crop


def test_photos_are_upright(tmp_path) -> None:
    image = Image.new("RGB", (60, 30), "black")
    image.paste("white", (0, 0, 30, 30))  # the left half, which the camera says is the upper one
    exif = image.getexif()
    exif[274] = 6  # to be turned clockwise
    image.save(tmp_path / "photo.jpg", exif=exif)
    x, shown = image_sources([tmp_path / "photo.jpg"], CONFIG)[0].load()
    assert x[0, :, :28].min() > 1.5
    assert x[0, :, 36:].max() < -1.5
    assert shown.getpixel((320, 100)) == (255, 255, 255)
