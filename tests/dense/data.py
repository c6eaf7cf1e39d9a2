"""Small generated datasets: coloured rectangles, as boxes and as label maps."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("red", "green")
SIZE = (96, 128)  # H, W


def _scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, list[tuple[int, list[float]]]]:
    H, W = SIZE
    image = rng.integers(90, 110, (H, W, 3), dtype=np.uint8)
    labels = np.zeros((H, W), dtype=np.uint8)
    boxes: list[tuple[int, list[float]]] = []
    for kind in (0, 1):
        w, h = rng.integers(24, 48, 2)
        x, y = rng.integers(0, W - w), rng.integers(0, H - h)
        image[y : y + h, x : x + w, kind] = 250
        labels[y : y + h, x : x + w] = kind + 1
        boxes.append((kind, [float(v) for v in (x, y, w, h)]))
    return image, labels, boxes


def detection(root: Path, count: int = 4) -> Path:
    """Write ``images/*.jpg`` and ``boxes.json``, with category ids from 1."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    data: dict[str, list] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)],
    }
    for i in range(1, count + 1):
        image, _, boxes = _scene(rng)
        Image.fromarray(image).save(root / f"images/{i}.jpg")
        data["images"].append({"id": i, "file_name": f"{i}.jpg", "height": SIZE[0], "width": SIZE[1]})
        for kind, box in boxes:
            data["annotations"].append(
                {
                    "id": len(data["annotations"]) + 1,
                    "image_id": i,
                    "category_id": kind + 1,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    (root / "boxes.json").write_text(json.dumps(data))
    return root


def segmentation(root: Path, count: int = 4) -> Path:
    """Write ``images/*.jpg`` and ``labels/*.png``: 0 is background, 1 and 2 are the rectangles."""
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (root / name).mkdir(parents=True)
    for i in range(count):
        image, labels, _ = _scene(rng)
        Image.fromarray(image).save(root / f"images/{i}.jpg")
        Image.fromarray(labels).save(root / f"labels/{i}.png")
    return root
