"""Faults in datasets are told before training, and converters write what the checks accept."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.dense.data import CLASSES, detection, segmentation
from visionattn.dense import DatasetError, check_coco, check_masks, voc_to_coco

pytestmark = pytest.mark.dense
ROOT = Path(__file__).parents[2]


def coco(root: Path, change: Callable[[dict[str, Any]], None] | None = None) -> list[str]:
    file = root / "boxes.json"
    if change is not None:
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))
    return check_coco(file, root / "images", classes=CLASSES)


def test_a_good_detection_dataset(tmp_path: Path) -> None:
    assert coco(detection(tmp_path)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["images"][1].update(file_name="gone.jpg"), "1 of 4 images are missing in .*: gone.jpg"),
        (
            lambda d: d["annotations"][0].update(category_id=3),
            r"1 annotations have a category id out of range \(known: 1 to 2\): annotation 1: category 3",
        ),
        (
            lambda d: d["annotations"][2].update(bbox=[100.0, 10.0, 60.0, 20.0]),
            r"1 boxes reach outside their image: annotation 3: \[100.0, 10.0, 60.0, 20.0\] in an image of 128 x 96",
        ),
        (lambda d: d["annotations"][2].update(bbox=[1.0, 1.0, 0.0, 5.0]), "1 boxes have no area"),
        (lambda d: d["annotations"][2].update(bbox=[1.0, 1.0]), "1 annotations have no box"),
        (
            lambda d: d["annotations"][0].update(image_id=77),
            "images that the file does not list: annotation 1: image 77",
        ),
        (lambda d: d["images"][0].update(width=64), "1.jpg is 128 x 96, expected 64 x 96"),
        (lambda d: d["images"].append(d["images"][0]), "1 image ids occur twice: 1"),
        (lambda d: d["annotations"].append(d["annotations"][0]), "1 annotation ids occur twice: 1"),
        (
            lambda d: d["categories"][0].update(name="blue"),
            r"1 classes of the config are not among the categories \(blue, green\): red",
        ),
        (lambda d: d["images"].clear(), "holds no images: the split is empty"),
        (lambda d: d["annotations"].clear(), "no usable box: the split is empty"),
        (lambda d: d.pop("categories"), "must hold the lists images, annotations and categories"),
    ],
)
def test_faults_of_a_detection_dataset(change: Callable, message: str, tmp_path: Path) -> None:
    lines = coco(detection(tmp_path), change)
    assert any(re.search(message, line) for line in lines), lines


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    root = detection(tmp_path)
    assert check_coco(root / "none.json", root / "images") == [f"no annotation file at {root / 'none.json'}"]
    assert check_coco(root / "boxes.json", root / "none") == [f"no folder of images at {root / 'none'}"]
    (root / "images/2.jpg").write_bytes(b"no image")
    assert re.search("cannot be read.*2.jpg", coco(root)[0])
    (root / "boxes.json").write_text("{")
    assert "is not JSON" in coco(root)[0]


def test_few_examples_stand_for_many_faults(tmp_path: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        for a in data["annotations"]:
            a["category_id"] = 9

    lines = coco(detection(tmp_path), change)
    assert lines[0].startswith("8 annotations have a category id out of range")
    assert lines[0].count("annotation ") == 3


def masks(root: Path, **kwargs: Any) -> list[str]:
    return check_masks(root / "images", root / "labels", **{"num_classes": 3, **kwargs})


def test_a_good_segmentation_dataset(tmp_path: Path) -> None:
    root = segmentation(tmp_path)
    assert masks(root) == []
    assert masks(root, num_classes=2, reduce_zero_label=True) == []
    assert masks(root, num_classes=2, ignore_index=2) == []


def test_faults_of_a_segmentation_dataset(tmp_path: Path) -> None:
    root = segmentation(tmp_path)
    assert "4 label maps have labels out of range (allowed: 0 to 1, 255): 0.png: 2" in masks(root, num_classes=2)[0]
    assert "the split is empty" in masks(root, img_suffix=".bmp")[0]
    assert "1 of 2 images are missing" in masks(root, names=["1", "gone"])[0]
    (root / "labels/3.png").unlink()
    Image.fromarray(np.zeros((96, 128, 3), dtype=np.uint8)).save(root / "labels/2.png")
    Image.fromarray(np.zeros((20, 20), dtype=np.uint8)).save(root / "labels/1.png")
    (root / "labels/0.png").write_bytes(b"no image")
    text = "\n".join(masks(root))
    assert "1 of 4 label maps are missing" in text
    assert "3.png" in text
    assert "colours instead of one class number a pixel: 2.png: mode RGB" in text
    assert "1.jpg is 128 x 96, expected 20 x 20" in text
    assert "cannot be read: 0.png" in text
    assert masks(tmp_path / "none") == [f"no folder at {tmp_path / 'none/images'}"]


VOC = """<annotation><filename>{name}.jpg</filename><size><width>128</width><height>96</height></size>
<object><name>cell</name><difficult>1</difficult>
<bndbox><xmin>1</xmin><ymin>11</ymin><xmax>20</xmax><ymax>30</ymax></bndbox></object>
<object><name>{second}</name>
<bndbox><xmin>100</xmin><ymin>{top}</ymin><xmax>140</xmax><ymax>96</ymax></bndbox></object></annotation>"""


def voc(root: Path, **kwargs: Any) -> Path:
    (root / "xml").mkdir()
    for name in ("a", "b"):
        (root / f"xml/{name}.xml").write_text(VOC.format(**{"name": name, "second": "dot", "top": 51, **kwargs}))
    return root / "xml"


def test_voc_boxes_become_coco_boxes(tmp_path: Path) -> None:
    data = voc_to_coco(voc(tmp_path), tmp_path / "out/train.json")
    assert json.loads((tmp_path / "out/train.json").read_text()) == data
    assert data["categories"] == [{"id": 1, "name": "cell"}, {"id": 2, "name": "dot"}]
    assert [i["file_name"] for i in data["images"]] == ["a.jpg", "b.jpg"]
    first, second = data["annotations"][:2]
    assert (first["bbox"], first["area"], first["ignore"], first["category_id"]) == ([0, 10, 20, 20], 400, 1, 1)
    assert second["bbox"] == [99, 50, 29, 46]  # cut at the image's border
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (128, 96)).save(tmp_path / f"images/{name}.jpg")
    assert check_coco(tmp_path / "out/train.json", tmp_path / "images", classes=["dot", "cell"]) == []


def test_voc_options(tmp_path: Path) -> None:
    folder = voc(tmp_path)
    data = voc_to_coco(folder, tmp_path / "b.json", names=["b"], classes=["dot", "cell"], one_based=False)
    assert [i["file_name"] for i in data["images"]] == ["b.jpg"]
    assert data["annotations"][0]["bbox"] == [1, 11, 19, 19]
    assert data["annotations"][0]["category_id"] == 2


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"top": 97}, {}, r"a.xml: object 2 \(dot\) has no area inside the image"),
        ({"top": "high"}, {}, "ymin is 'high', expected a number"),
        ({"second": ""}, {}, "<object> has no name"),
        ({}, {"classes": ["cell"]}, r"objects of dot, which are not among the classes \['cell'\]"),
        ({}, {"names": ["a", "z"]}, "no annotation at .*z.xml"),
        ({"name": "&"}, {}, "is not XML"),
    ],
)
def test_voc_faults(change: dict, options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=message):
        voc_to_coco(voc(tmp_path, **change), tmp_path / "out.json", **options)


def test_voc_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*args: str) -> int | str | None:
        monkeypatch.setattr(sys, "argv", ["voc_to_coco.py", *args])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / "tools/voc_to_coco.py"), run_name="__main__")
        return stopped.value.code

    assert run(str(voc(tmp_path)), str(tmp_path / "out.json"), "--classes", "cell", "dot") == 0
    assert "2 images, 4 boxes, 2 classes" in capsys.readouterr().out
    assert run(str(tmp_path / "none"), str(tmp_path / "out.json")) == 1
    assert "error: no annotations (*.xml) in" in capsys.readouterr().err
