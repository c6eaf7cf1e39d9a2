"""Look at many images: pages and pictures in a folder, which a second run goes on with."""

import io
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform, is_img_extension
from torch import Tensor, nn

from visionattn.analysis._stages import UnknownLayerError
from visionattn.analysis.findings import METHODS, Findings, check_methods, look
from visionattn.analysis.gradients import ReceptiveField, receptive_fields
from visionattn.analysis.page import render_page
from visionattn.analysis.pictures import draw_attention, draw_maps, draw_overview, draw_receptive_fields
from visionattn.extras import require

FIELD_IMAGES = 4  # that receptive fields are averaged over
OVERVIEW = 8  # images in the overview
PICTURE = 640  # pixels along the longer side of the picture in a page, at least
MORE_EXTENSIONS = (".bmp", ".gif", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Source:
    """An image to look at.

    Attributes:
        name: Of the outputs, relative to their folder and without a suffix.
        load: Returns the image as the model takes it, ``(1, C, H, W)``, and as a person sees it (PIL).
    """

    name: str
    load: Callable[[], tuple[Tensor, Any]]


@dataclass
class Summary:
    """What `visualize` did: names of images, and why some were skipped."""

    written: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def image_sources(paths: Sequence[str | Path], config: dict[str, Any]) -> list[Source]:
    """Find images: files as they are named, and those in folders, sub-folders included, in order.

    Args:
        paths: Files and folders.
        config: The model's preprocessing, as `timm.data.resolve_model_data_config` gives it.

    Raises:
        FileNotFoundError: a path does not exist, or a folder holds no images.
    """
    found: dict[Path, Path] = {}  # file to its name below the folder that was given
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and _is_image(p))
            if not inside:
                raise FileNotFoundError(f"no images in the folder {path}")
            found |= {p: p.relative_to(path) for p in inside}
        elif path.is_file():
            found.setdefault(path, Path(path.name))
        else:
            raise FileNotFoundError(f"no image at {path}")
    stems = [name.with_suffix("") for name in found.values()]
    names = [stem if stems.count(stem) == 1 else name for stem, name in zip(stems, found.values(), strict=True)]
    if len(set(names)) < len(names):  # the same name in two of the folders
        names = [Path(path.parent.name) / name for path, name in zip(found, names, strict=True)]
    reader = _Reader(config)
    return [Source(name.as_posix(), lambda p=path: reader.read(p)) for path, name in zip(found, names, strict=True)]  # type: ignore[misc]


def _is_image(path: Path) -> bool:
    return is_img_extension(path.suffix.lower()) or path.suffix.lower() in MORE_EXTENSIONS


class _Reader:
    """Reads files as the model takes them, and the same crop at a resolution for looking."""

    def __init__(self, config: dict[str, Any]) -> None:
        keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
        options = {key: config[key] for key in keys if key in config}
        channels, height, width = options["input_size"]
        times = -(-PICTURE // max(height, width))
        self.mode = "L" if channels == 1 else "RGB"
        self.transform: Any = create_transform(**options)
        plain = {"mean": (0.0,) * channels, "std": (1.0,) * channels}
        self.crop: Any = create_transform(
            **{**options, **plain, "input_size": (channels, times * height, times * width)}
        )

    def read(self, path: Path) -> tuple[Tensor, Any]:
        from PIL import Image, ImageOps

        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert(self.mode)  # upright, as cameras mean it
        pixels = (self.crop(image) * 255).round().to(torch.uint8)  # (C, H, W)
        return self.transform(image)[None], as_picture(pixels)


def as_picture(pixels: Tensor) -> Any:
    """A PIL image of ``(C, H, W)`` in bytes, of one channel or three."""
    from PIL import Image

    return Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).contiguous().numpy())


def visualize(
    model: nn.Module,
    sources: Sequence[Source],
    out: str | Path,
    *,
    name: str,
    origin: str = "",
    class_names: Sequence[str] | None = None,
    methods: Collection[str] = METHODS,
    layers: Sequence[str] | None = None,
    cam_layer: str | None = None,
    target: int | None = None,
    overwrite: bool = False,
) -> Summary:
    """Write a page ``<image>.html`` and pictures ``<image>.<method>.png`` for every image, with a progress bar.

    An image whose page exists is left as it is; one that cannot be read is reported and skipped. Receptive fields are
    the mean over the first images and go to ``erf.png``; several images with attention are put side by side in
    ``overview.png``; these two are not written again, either.

    Args:
        model: A classifier in eval mode; timm's MaxViT, DaViT, ConViT and SHViT fused (`visionattn.fuse`).
        sources: Images, as `image_sources` finds them.
        out: Folder to write to; it is made.
        name: The model's name, for titles.
        origin: A line about its weights.
        class_names: Names of the classes.
        methods: Of ``"attention"``, ``"rollout"``, ``"gradcam"``, ``"erf"``, ``"features"``.
        layers: Attention layers to show; all if None.
        cam_layer: Layer of Grad-CAM.
        target: Class of Grad-CAM.
        overwrite: Write pages and pictures that exist again.

    Raises:
        ValueError: a method, a layer or a class does not exist, or the model does not take such images.
    """
    tqdm = require("tqdm", "the progress bar", "visionattn[train]").tqdm
    check_methods(methods)
    out, summary = Path(out), Summary()
    shown: list[tuple[Findings, Any]] = []
    fields: list[ReceptiveField] | None = None
    device = next(model.parameters()).device
    with tqdm(sources, unit="image", desc=name, file=sys.stderr) as bar:
        for source in bar:
            page = out / f"{source.name}.html"
            if page.exists() and not overwrite:
                summary.kept.append(source.name)
                continue
            read = _try(source)
            if isinstance(read, str):
                summary.skipped[source.name] = read
                bar.write(f"skipped {source.name}: {read}", file=sys.stderr)
                continue
            x, image = read
            try:
                if fields is None:
                    fields = _fields(model, sources, device) if "erf" in methods else []
                found = look(
                    model,
                    x.to(device),
                    methods=methods,
                    layers=layers,
                    cam_layer=cam_layer,
                    target=target,
                    fields=fields,
                )
            except AssertionError as e:  # timm's check of the size
                raise ValueError(f"{name} does not take images of {x.shape[2]} x {x.shape[3]}: {e}") from e
            figures = draw_maps(found, image, class_names)
            if found.attention:
                figures["attention"] = draw_attention(found, image)
                shown = [*shown, (found, image)][:OVERVIEW]
            for method, figure in figures.items():
                _save(figure, out / f"{source.name}.{method}.png")
            text = render_page(found, image, title=source.name, model=name, origin=origin, class_names=class_names)
            _write(page, text.encode())  # last: a page says that its image is done
            summary.written.append(source.name)
    if fields and (overwrite or not (out / "erf.png").exists()):
        _save(draw_receptive_fields(fields), out / "erf.png")
    if len(shown) > 1 and (overwrite or not (out / "overview.png").exists()):
        _save(draw_overview([f for f, _ in shown], [i for _, i in shown], class_names), out / "overview.png")
    return summary


def _try(source: Source) -> tuple[Tensor, Any] | str:
    """Load an image, or say why not in a line."""
    from PIL import Image

    try:
        return source.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:  # what Pillow's decoders raise
        return str(e).splitlines()[0] if str(e) else type(e).__name__


def _fields(model: nn.Module, sources: Sequence[Source], device: torch.device) -> list[ReceptiveField]:
    images: list[Tensor] = []
    for source in sources:
        read = _try(source)
        if not isinstance(read, str):
            images.append(read[0].to(device))
        if len(images) == FIELD_IMAGES:
            break
    try:
        return receptive_fields(model, images)
    except UnknownLayerError:  # the pages say so
        return []


def _save(figure: Any, path: Path) -> None:
    data = io.BytesIO()
    figure.savefig(data, dpi=120, format="png")
    _write(path, data.getvalue())


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)
