"""Say what is wrong with a detection or segmentation dataset before training starts."""

import inspect
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from visionattn.dense.errors import DatasetError

SAMPLE = 200  # images and label maps that are opened; every file's existence is checked


class Faults:
    """Faults by kind, each with its first examples."""

    def __init__(self) -> None:
        self._examples: dict[str, list[str]] = {}
        self._counts: Counter[str] = Counter()

    def add(self, kind: str, example: str = "") -> None:
        """Count a fault; ``kind`` is a sentence in which {n} stands for how often it occurs."""
        self._counts[kind] += 1
        examples = self._examples.setdefault(kind, [])
        if example and len(examples) < 3:
            examples.append(example)

    def lines(self) -> list[str]:
        """One line a kind of fault."""
        return [
            kind.replace("{n}", str(self._counts[kind])) + (f": {', '.join(examples)}" if examples else "")
            for kind, examples in self._examples.items()
        ]


def check_coco(
    annotations: str | Path, images: str | Path, *, classes: Sequence[str] | None = None, sample: int | None = SAMPLE
) -> list[str]:
    """Return what is wrong with a detection dataset in COCO's format; nothing is wrong if the list is empty.

    Missing and empty files, double ids, missing images, images of another size than the annotations say, annotations
    of unknown images or categories, boxes without area or outside their image, classes that do not occur.

    Args:
        annotations: The JSON file.
        images: The folder that ``file_name`` is relative to.
        classes: Names that training looks for among the categories; not checked if None.
        sample: Images to open, evenly spread; all if None.
    """
    file, folder = Path(annotations), Path(images)
    if not file.is_file():
        return [f"no annotation file at {file}"]
    try:
        data = json.loads(file.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        return [f"{file} is not JSON: {error}"]
    keys = ("images", "annotations", "categories")
    if not isinstance(data, dict) or not all(isinstance(data.get(k), list) for k in keys):
        return [f"{file} must hold the lists images, annotations and categories"]
    if not data["images"]:
        return [f"{file} holds no images: the split is empty"]
    if not folder.is_dir():
        return [f"no folder of images at {folder}"]
    faults = Faults()
    names = {c["id"]: c["name"] for c in data["categories"]}
    for name in classes or ():
        if name not in names.values():
            faults.add(f"{{n}} classes of the config are not among the categories ({_few(names.values())})", name)
    sizes: dict[Any, tuple[int, int]] = {}
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    opened = _spread(data["images"], sample)
    for i, image in enumerate(data["images"]):
        name = image["file_name"]
        if image["id"] in sizes:
            faults.add("{n} image ids occur twice", str(image["id"]))
        sizes[image["id"]] = size = (image["width"], image["height"])
        if Path(name).as_posix() not in present:
            faults.add(f"{{n}} of {len(data['images'])} images are missing in {folder}", name)
        elif i in opened and (fault := _open(folder / name, size)):
            faults.add("{n} images cannot be read as the annotations say", fault)
    _check_boxes(data["annotations"], sizes, names, faults, file)
    return faults.lines()


def _check_boxes(
    annotations: list[dict[str, Any]],
    sizes: Mapping[Any, tuple[int, int]],
    names: Mapping[Any, str],
    faults: Faults,
    file: Path,
) -> None:
    ids = Counter(a.get("id") for a in annotations)
    for number in (i for i, count in ids.items() if count > 1):
        faults.add("{n} annotation ids occur twice", str(number))
    boxes = 0
    for a in annotations:
        where = f"annotation {a.get('id')}"
        if a.get("image_id") not in sizes:
            faults.add(
                "{n} annotations are of images that the file does not list", f"{where}: image {a.get('image_id')}"
            )
            continue
        if a.get("category_id") not in names:
            ids_known = f"{min(names)} to {max(names)}" if names else "none"
            faults.add(
                f"{{n}} annotations have a category id out of range (known: {ids_known})",
                f"{where}: category {a.get('category_id')}",
            )
            continue
        box, (width, height) = a.get("bbox"), sizes[a["image_id"]]
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(x, (int, float)) for x in box)):
            faults.add("{n} annotations have no box [x, y, width, height]", f"{where}: {box}")
            continue
        x, y, w, h = box
        where = f"{where}: {box} in an image of {width} x {height}"
        if w <= 0 or h <= 0:
            faults.add("{n} boxes have no area", where)
        elif x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:  # a pixel more is rounding
            faults.add("{n} boxes reach outside their image", where)
        else:
            boxes += 1
    if not boxes:
        faults.add(f"{file} holds no usable box: the split is empty")


def check_masks(
    images: str | Path,
    labels: str | Path,
    *,
    num_classes: int,
    ignore_index: int = 255,
    img_suffix: str = ".jpg",
    seg_map_suffix: str = ".png",
    reduce_zero_label: bool = False,
    names: Sequence[str] | None = None,
    sample: int | None = SAMPLE,
) -> list[str]:
    """Return what is wrong with a segmentation dataset of label maps; nothing is wrong if the list is empty.

    Missing folders and files, maps that are no single-channel image or not of their image's size, labels out of range.

    Args:
        images: Folder of images.
        labels: Folder of label maps; each pixel is a class number.
        num_classes: Classes.
        ignore_index: Label of pixels that do not count.
        img_suffix: Ends the images' names.
        seg_map_suffix: Ends the maps' names.
        reduce_zero_label: Label 0 does not count, and label 1 is the first class.
        names: Names to take, without suffix; all in ``images`` if None.
        sample: Images and maps to open, evenly spread; all if None.
    """
    images, labels = Path(images), Path(labels)
    for folder in (images, labels):
        if not folder.is_dir():
            return [f"no folder at {folder}"]
    ours, theirs = (
        {path.relative_to(f).as_posix().removesuffix(suffix) for path in f.rglob(f"*{suffix}")}
        for f, suffix in ((images, img_suffix), (labels, seg_map_suffix))
    )
    stems = sorted(ours if names is None else set(names))
    if not stems:
        return [f"no images (*{img_suffix}) in {images}: the split is empty"]
    faults = Faults()
    opened = _spread(stems, sample)
    allowed = {*range(num_classes + reduce_zero_label), ignore_index, *([255] if reduce_zero_label else [])}
    for i, stem in enumerate(stems):
        if stem not in ours:
            faults.add(f"{{n}} of {len(stems)} images are missing in {images}", f"{stem}{img_suffix}")
        elif stem not in theirs:
            faults.add(f"{{n}} of {len(stems)} label maps are missing in {labels}", f"{stem}{seg_map_suffix}")
        elif i in opened:
            _check_mask(images / f"{stem}{img_suffix}", labels / f"{stem}{seg_map_suffix}", allowed, faults)
    return faults.lines()


def _check_mask(image: Path, label: Path, allowed: set[int], faults: Faults) -> None:
    try:
        with Image.open(label) as mask:
            mode, size = mask.mode, mask.size
            found = {value for _, value in mask.getcolors(1 << 24)} if mode in ("L", "P", "I;16", "I", "1") else set()
    except (OSError, UnidentifiedImageError) as error:
        faults.add("{n} label maps cannot be read", f"{label.name}: {error}")
        return
    if not found:
        faults.add("{n} label maps have colours instead of one class number a pixel", f"{label.name}: mode {mode}")
    elif wrong := sorted(found - allowed):
        faults.add(
            f"{{n}} label maps have labels out of range (allowed: {_ranges(allowed)})", f"{label.name}: {_few(wrong)}"
        )
    if fault := _open(image, size):
        faults.add("{n} images cannot be read or differ in size from their label map", fault)


def check_config(
    cfg: Any, *, splits: Sequence[str] = ("train", "val", "test"), sample: int | None = SAMPLE
) -> list[str]:
    """Check the datasets of a config, and that its heads have as many classes.

    Args:
        cfg: ``mmengine.Config`` of mmdetection or mmsegmentation.
        splits: Which of its dataloaders to check.
        sample: Files to open in each dataset, evenly spread; all if None.

    Returns:
        A line for each dataset that was checked, or was not because it is of a kind that is not known here.

    Raises:
        DatasetError: Something is wrong; the message lists it by dataset.
    """
    report, wrong, seen = [], [], set()
    for split in splits:
        loader = cfg.get(f"{split}_dataloader")
        for dataset in _datasets(loader.get("dataset") if loader else None):
            key = json.dumps({k: v for k, v in dataset.items() if k != "pipeline"}, sort_keys=True, default=str)
            if key in seen:
                continue
            seen.add(key)
            lines = _check_dataset(dataset, cfg, sample)
            if lines is None:
                report.append(f"{split}: {dataset['type']} is not checked")
            elif lines:
                wrong += [f"{split}: {line}" for line in lines]
            else:
                report.append(f"{split}: {dataset['type']} is in order")
    if wrong:
        raise DatasetError("\n  ".join(["the data cannot be trained on:", *wrong]))
    return report


def _datasets(cfg: Any) -> Iterator[Any]:
    """The datasets inside wrappers that repeat, balance or join them."""
    if cfg is None:
        return
    inner = cfg.get("datasets") or ([cfg["dataset"]] if "dataset" in cfg else [])
    if not inner:
        yield cfg
    for dataset in inner:
        yield from _datasets(dataset)


def _check_dataset(cfg: Any, whole: Any, sample: int | None) -> list[str] | None:
    """Faults of one dataset; None if it is of an unknown kind."""
    cls = _class(cfg["type"], whole.default_scope)
    kind = {base.__name__ for base in cls.__mro__}
    prefix, root = cfg.get("data_prefix") or {}, cfg.get("data_root") or ""
    classes = (cfg.get("metainfo") or {}).get("classes") or cls.METAINFO.get("classes")
    ann_file = cfg.get("ann_file") or ""
    if "CocoDataset" in kind:
        lines = check_coco(_join(root, ann_file), _join(root, prefix.get("img", "")), classes=classes, sample=sample)
    elif "BaseSegDataset" in kind:
        if classes is None:
            return ["the dataset has no class names: set metainfo=dict(classes=...)"]
        defaults = _defaults(cls)
        option = {
            k: cfg.get(k, defaults[k]) for k in ("img_suffix", "seg_map_suffix", "ignore_index", "reduce_zero_label")
        }
        names = None
        if ann_file:
            listing = _join(root, ann_file)
            if not listing.is_file():
                return [f"no list of images at {listing}"]
            names = listing.read_text().split()
        folders = [_join(root, prefix.get(k, "")) for k in ("img_path", "seg_map_path")]
        lines = check_masks(*folders, num_classes=len(classes), names=names, sample=sample, **option)
    else:
        return None
    for where, count in _heads(whole.get("model"), "model"):
        if classes is not None and count != len(classes):
            lines.append(f"{where} is {count}, but the dataset has {len(classes)} classes")
    return lines


def _class(name: Any, scope: str) -> Any:
    if isinstance(name, type):
        return name
    from mmengine.registry import DATASETS, DefaultScope, init_default_scope

    if DefaultScope.get_current_instance() is None or DefaultScope.get_current_instance().scope_name != scope:
        init_default_scope(scope)
    with DATASETS.switch_scope_and_registry(None) as registry:
        cls = registry.get(name)
    if cls is None:
        raise DatasetError(f"no dataset is called {name!r} in {scope}")
    return cls


def _defaults(cls: type) -> dict[str, Any]:
    """Default arguments of a segmentation dataset, those of its bases among them."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if "__init__" in vars(base):
            parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
            found |= {p.name: p.default for p in parameters if p.default is not p.empty}
    return found


def _heads(cfg: Any, where: str) -> Iterator[tuple[str, int]]:
    if isinstance(cfg, Mapping):
        for key, value in cfg.items():
            if key == "num_classes" and isinstance(value, int):
                yield f"{where}.{key}", value
            else:
                yield from _heads(value, f"{where}.{key}")
    elif isinstance(cfg, (list, tuple)):
        for i, value in enumerate(cfg):
            yield from _heads(value, f"{where}[{i}]")


def _join(root: str, path: str) -> Path:
    return Path(root) / path


def _open(path: Path, size: tuple[int, int]) -> str | None:
    try:
        with Image.open(path) as image:
            found = image.size
    except (OSError, UnidentifiedImageError) as error:
        return f"{path.name}: {error}"
    return None if found == size else f"{path.name} is {found[0]} x {found[1]}, expected {size[0]} x {size[1]}"


def _spread(items: Sequence[Any], sample: int | None) -> set[int]:
    count = len(items)
    return set(range(count)) if sample is None or sample >= count else {i * count // sample for i in range(sample)}


def _few(items: Iterable[Any], most: int = 8) -> str:
    items = [str(x) for x in items]
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _ranges(numbers: set[int]) -> str:
    top = max(i for i in range(len(numbers)) if i in numbers)
    others = sorted(n for n in numbers if n > top)
    return ", ".join([f"0 to {top}", *map(str, others)])
