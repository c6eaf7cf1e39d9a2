"""Pascal-VOC annotations (one XML file an image) to COCO's JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from visionattn.dense.errors import DatasetError


def voc_to_coco(
    annotations: str | Path,
    out: str | Path,
    *,
    names: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    one_based: bool = True,
) -> dict[str, Any]:
    """Convert a folder of Pascal-VOC XML files to one COCO JSON file.

    Args:
        annotations: The folder.
        out: The file to write.
        names: Files to take, without suffix, as in VOC's ``ImageSets``; all if None.
        classes: Class names in the order of their ids, which begin at 1; those that occur, sorted, if None.
        one_based: Corners count pixels from 1 and the last one belongs to the box, as VOC defines. If False they are
            coordinates from 0, as most labelling programs write them.

    Returns:
        What was written: ``images``, ``annotations`` (``bbox`` is x, y, width, height in pixels) and ``categories``.
        Boxes reaching over the border are cut there; "difficult" ones are marked ``ignore``.

    Raises:
        DatasetError: A file is missing or is no VOC annotation, a class is not in ``classes``, a box has no area
            inside its image.
    """
    folder = Path(annotations)
    files = sorted(folder.glob("*.xml")) if names is None else [folder / f"{name}.xml" for name in names]
    if not files:
        raise DatasetError(f"no annotations (*.xml) in {folder}")
    parsed = [_parse(file, one_based) for file in files]
    found = sorted({box["name"] for _, boxes in parsed for box in boxes})
    labels = list(classes) if classes is not None else found
    if unknown := [name for name in found if name not in labels]:
        raise DatasetError(f"{folder} has objects of {', '.join(unknown)}, which are not among the classes {labels}")
    data: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(labels, 1)],
    }
    for image_id, (image, boxes) in enumerate(parsed, 1):
        data["images"].append({"id": image_id, **image})
        for box in boxes:
            x, y, w, h = box["bbox"]
            data["annotations"].append(
                {
                    "id": len(data["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": labels.index(box["name"]) + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                    "ignore": box["difficult"],
                }
            )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(data))
    return data


def _parse(file: Path, one_based: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if not file.is_file():
        raise DatasetError(f"no annotation at {file}")
    try:
        root = ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        raise DatasetError(f"{file} is not XML: {error}") from error
    width, height = (int(_number(root, f"size/{side}", file)) for side in ("width", "height"))
    if width < 1 or height < 1:
        raise DatasetError(f"{file}: an image of {width} x {height} pixels")
    image = {"file_name": _text(root, "filename", file), "width": width, "height": height}
    boxes = []
    for number, element in enumerate(root.iter("object"), 1):
        name = _text(element, "name", file)
        corners = [_number(element, f"bndbox/{corner}", file) for corner in ("xmin", "ymin", "xmax", "ymax")]
        left, top = (x - one_based for x in corners[:2])
        x0, y0, x1, y1 = max(left, 0.0), max(top, 0.0), min(corners[2], width), min(corners[3], height)
        if x1 <= x0 or y1 <= y0:
            raise DatasetError(f"{file}: object {number} ({name}) has no area inside the image: corners {corners}")
        difficult = int(float(element.findtext("difficult") or 0))
        boxes.append({"name": name, "bbox": (x0, y0, x1 - x0, y1 - y0), "difficult": difficult})
    return image, boxes


def _text(element: ElementTree.Element, tag: str, file: Path) -> str:
    text = (element.findtext(tag) or "").strip()
    if not text:
        raise DatasetError(f"{file}: <{element.tag}> has no {tag}")
    return text


def _number(element: ElementTree.Element, tag: str, file: Path) -> float:
    text = _text(element, tag, file)
    try:
        return float(text)
    except ValueError:
        raise DatasetError(f"{file}: {tag} is {text!r}, expected a number") from None
