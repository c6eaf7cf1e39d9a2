"""8-bit post-training quantisation of an exported model (ONNX Runtime, static, QDQ), and what it costs in accuracy.

Weights are symmetric, activations asymmetric with fixed ranges that calibration images span, one range a tensor.
"""

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_model_data_config
from timm.data.readers.img_extensions import get_img_extensions
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from visionattn.analysis.subject import Subject
from visionattn.extras import require

Run = Callable[[Tensor], Tensor]
INSTALL = "visionattn[export]"


class QuantizationError(RuntimeError):
    """An 8-bit version cannot be made of a file; the message says why."""


@dataclass(frozen=True)
class Accuracy:
    """Share of images whose label is the first guess, or among the first five, in percent."""

    top1: float
    top5: float
    images: int


class Images(Dataset[Tensor]):
    """All images in a folder and those below it, as a model takes them in evaluation: ``(C, H, W)``.

    Args:
        folder: Holds images, in any arrangement.
        transform: From a Pillow image to a tensor: `evaluation_transform`.
        count: Images to take, spread evenly over all in the order of their paths; all of them if None.
        mode: Pillow mode to convert to.

    Raises:
        ValueError: the folder holds no images.
    """

    def __init__(
        self, folder: str | Path, transform: Callable[[Any], Tensor], *, count: int | None = None, mode: str = "RGB"
    ) -> None:
        known = get_img_extensions(as_set=True)
        files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in known and p.is_file())
        if not files:
            raise ValueError(f"no images in {folder}: expected a folder of {', '.join(sorted(known))} files")
        if count is not None and count < len(files):
            files = [files[i * len(files) // count] for i in range(count)]
        self.files, self.transform, self.mode = files, transform, mode

    def __len__(self) -> int:
        """Number of images."""
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        """One image."""
        with Image.open(self.files[index]) as image:
            return self.transform(image.convert(self.mode))

    def batches(self, size: int = 32) -> Iterator[Tensor]:
        """Yield all images in batches ``(B, C, H, W)``."""
        yield from DataLoader(self, batch_size=size)


def evaluation_transform(model: nn.Module, data_config: Mapping[str, Any] | None = None) -> Callable[[Any], Tensor]:
    """Return timm's evaluation transform of a model, at the size and with the normalisation that it is made for.

    Args:
        model: Has a ``pretrained_cfg``.
        data_config: ``input_size``, ``mean``, ``std``, ``crop_pct``, ... in place of the model's.
    """
    config = resolve_model_data_config(model, dict(data_config or {}))
    transform: Any = create_transform(**config, is_training=False)
    return transform


def labelled(
    folder: str | Path, transform: Callable[[Any], Tensor], *, classes: Sequence[str] | None = None, batch: int = 64
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and labels in batches from a folder of class folders; it may hold ``val/`` or ``validation/``.

    Args:
        folder: The data set.
        transform: As for `Images`.
        classes: Names of the class folders in the order of the labels; alphabetical if None.
        batch: Images in a batch.

    Raises:
        ValueError: there are no images, or no folder for a class.
    """
    order: Any = {name: i for i, name in enumerate(classes)} if classes is not None else ""
    try:
        dataset = create_dataset("", str(folder), split="validation", class_map=order)
    except (RuntimeError, FileNotFoundError) as e:
        raise ValueError(f"no labelled images in {folder}: expected a folder for each class, in it or its val/") from e
    dataset.transform = transform
    yield from DataLoader(dataset, batch_size=batch)


def accuracy(run: Run, data: Iterable[tuple[Tensor, Tensor]]) -> Accuracy:
    """Evaluate ``run``, images ``(B, C, H, W)`` to logits ``(B, classes)``, on images with labels ``(B,)``.

    Raises:
        ValueError: a label is not among the classes.
    """
    first = five = images = 0
    for x, labels in data:
        logits = run(x)
        if int(labels.max()) >= logits.shape[1]:
            raise ValueError(f"the images have a label {int(labels.max())}, the model has {logits.shape[1]} classes")
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        first += int(hits[:, 0].sum())
        five += int(hits.any(dim=1).sum())
        images += len(labels)
    return Accuracy(round(100 * first / images, 4), round(100 * five / images, 4), images)


def session(path: str | Path) -> Run:
    """Return a function that runs an exported ONNX file on the CPU, one thread for each of PyTorch's.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
    """
    onnxruntime: Any = require("onnxruntime", "running an ONNX file", INSTALL)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    loaded = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (name,) = (x.name for x in loaded.get_inputs())
    return lambda x: torch.from_numpy(loaded.run(None, {name: x.contiguous().numpy()})[0])


def quantize(source: Path, target: Path, batches: Iterable[Tensor], *, per_channel: bool = True) -> int:
    """Write an 8-bit version of an exported ONNX file.

    Every operator that ONNX Runtime can quantise is: matrix products and convolutions, sums, products, softmax.

    Args:
        source: What `visionattn.analysis.export.export` wrote as ONNX.
        target: The file to write.
        batches: Images ``(B, C, H, W)`` as the model takes them; their activations set the ranges.
        per_channel: A scale for each output channel of a weight rather than for the whole of it.

    Returns:
        How many images set the ranges.

    Raises:
        QuantizationError: ONNX Runtime cannot.
        MissingExtraError: ONNX Runtime or ONNX is not installed.
    """
    require("onnx", "quantising", INSTALL)
    require("onnxruntime", "quantising", INSTALL)
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches, self.images = iter(batches), 0

        def get_next(self) -> dict[str, Any] | None:
            for x in islice(self.batches, 1):
                self.images += len(x)
                return {"images": x.contiguous().numpy()}
            return None

    reader = Reader()
    with tempfile.TemporaryDirectory() as folder, _quiet():
        prepared = Path(folder) / "prepared.onnx"
        try:
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared, target, reader, quant_format=QuantFormat.QDQ, per_channel=per_channel,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            )  # fmt: skip
        except Exception as e:  # ONNX Runtime raises what it likes
            raise QuantizationError(f"ONNX Runtime cannot quantise {source}: {str(e).strip().splitlines()[0]}") from e
    return reader.images


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the root logger's warnings, of which ONNX Runtime writes one for each norm's weight."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def agreement(run: Run, other: Run, batches: Iterable[Tensor]) -> float:
    """Return the share of images, in percent, for which two functions have the same first guess."""
    same = images = 0
    for x in batches:
        same += int((run(x).argmax(dim=1) == other(x).argmax(dim=1)).sum())
        images += len(x)
    return round(100 * same / images, 4)


@dataclass(frozen=True)
class Quantized:
    """What quantising a file did.

    Attributes:
        path: The 8-bit file.
        megabytes: Its size; ``megabytes_before`` that of the file it was made from.
        calibration_images: How many set the ranges.
        per_channel: Whether each output channel of a weight has a scale.
        agreement: Calibration images, in percent, for which both files have the same first guess.
        before: Accuracy of the file that it was made from; None without an evaluation.
        after: Its accuracy.
    """

    path: Path
    megabytes: float
    megabytes_before: float
    calibration_images: int
    per_channel: bool
    agreement: float
    before: Accuracy | None = None
    after: Accuracy | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values, without the path."""
        values = asdict(self)
        del values["path"]
        return values


def quantize_file(
    source: str | Path, target: str | Path, images: Images,
    evaluation: Callable[[], Iterable[tuple[Tensor, Tensor]]] | None = None, *, per_channel: bool = True,
) -> Quantized:  # fmt: skip
    """Quantise an exported ONNX file, run both files, and compare them.

    Args:
        source: What `visionattn.analysis.export.export` wrote as ONNX.
        target: The file to write.
        images: For calibration.
        evaluation: Starts a pass over images with labels, as `labelled` yields them.
        per_channel: A scale for each output channel of a weight.

    Raises:
        QuantizationError: the 8-bit file cannot be made, or gives no finite numbers; no file is left.
        ValueError: an image has a label that the model does not know.
        MissingExtraError: ONNX Runtime or ONNX is not installed.
    """
    source, target = Path(source), Path(target)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".quantize-") as folder:
        written = Path(folder) / target.name
        count = quantize(source, written, images.batches(), per_channel=per_channel)
        before, after = session(source), session(written)
        if not all(after(x).isfinite().all() for x in islice(images.batches(), 1)):
            raise QuantizationError(f"the 8-bit version of {source} gives numbers that are not finite")
        result = Quantized(
            target,
            _megabytes(written),
            _megabytes(source),
            count,
            per_channel,
            agreement(before, after, images.batches()),
            accuracy(before, evaluation()) if evaluation is not None else None,
            accuracy(after, evaluation()) if evaluation is not None else None,
        )
        written.replace(target)
    return result


def _megabytes(path: Path) -> float:
    return round(path.stat().st_size / 2**20, 3)


def quantize_subject(
    subject: Subject, source: Path, target: Path, *, calibration: str | Path, images: int = 256,
    evaluation: str | Path | None = None, per_channel: bool = True,
) -> Quantized:  # fmt: skip
    """Quantise what was exported of a model, with folders of images read through timm's evaluation transform.

    Args:
        subject: What was exported.
        source: The ONNX file.
        target: The file to write.
        calibration: A folder of images, in any arrangement.
        images: How many of them to take.
        evaluation: A folder of class folders, or None.
        per_channel: A scale for each output channel of a weight.

    Raises:
        QuantizationError: see `quantize_file`.
        ValueError: a folder holds no images, or a label that the model does not know.
        MissingExtraError: ONNX Runtime or ONNX is not installed.
    """
    chans = int(getattr(subject.model, "in_chans", 3))
    config = {**subject.data_config, "input_size": (chans, *subject.size)}
    transform = evaluation_transform(subject.model, config)
    chosen = Images(calibration, transform, count=images, mode="L" if chans == 1 else "RGB")

    def start() -> Iterator[tuple[Tensor, Tensor]]:
        return labelled(str(evaluation), transform, classes=subject.class_names)

    return quantize_file(source, target, chosen, start if evaluation is not None else None, per_channel=per_channel)
