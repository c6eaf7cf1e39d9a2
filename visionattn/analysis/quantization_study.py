"""Whether gates and clipping make attention that quantises better than softmax: models of one recipe, side by side."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from visionattn.analysis import outliers, quantize
from visionattn.analysis.bench import machine
from visionattn.analysis.export import export
from visionattn.analysis.subject import create
from visionattn.models import CheckpointError
from visionattn.models._checkpoint import read_header

BESIDE = (
    "model",
    "model_kwargs",
    "output",
    "experiment",
    "resume",
    "data_dir",
    "progress",
    "tensorboard",
    "time_limit",
)


def examine(checkpoint: Path, data_dir: Path, *, calibration_images: int = 256) -> dict[str, Any]:
    """Quantise one trained model to 8 bits, with a scale a channel and a scale a weight, and measure its outliers.

    Args:
        checkpoint: Written by training here.
        data_dir: Holds ``train/``, from which images for calibration and outliers are taken, and ``val/``.
        calibration_images: How many.

    Returns:
        ``attention`` (``"softmax"``, ``"gated"`` or ``"clipped"``), ``model`` and its arguments, ``epochs``; top-1 in
        percent ``fp32``, ``int8`` and ``int8_per_tensor`` on ``images`` images; ``max_infinity_norm``,
        ``mean_kurtosis`` and ``max_kurtosis`` as `outliers.Summary` says.

    Raises:
        CheckpointError: the file does not say which model it is of.
        ExportError, QuantizationError, ValueError: see `export` and `quantize.quantize_subject`.
    """
    header = read_header(checkpoint)
    if header is None:
        raise CheckpointError(f"{checkpoint} does not say which model it is of: give a file of tools/train.py")
    subject = create(header["model"], checkpoint=checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        whole, small = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        export(subject.model, whole, format="onnx", size=subject.size)
        common: dict[str, Any] = {"calibration": data_dir / "train", "images": calibration_images}
        found = {
            per_channel: quantize.quantize_subject(
                subject, whole, small, evaluation=data_dir, per_channel=per_channel, **common
            )
            for per_channel in (True, False)
        }
    transform = quantize.evaluation_transform(subject.model, subject.data_config)
    seen = quantize.Images(data_dir / "train", transform, count=calibration_images)
    summary = outliers.measure(subject.model, seen.batches())
    before, after, per_tensor = found[True].before, found[True].after, found[False].after
    assert before is not None
    assert after is not None
    assert per_tensor is not None
    return {
        "attention": attention(header),
        "model": header["model"],
        "model_kwargs": header["model_kwargs"],
        "epochs": header["epoch"] + 1,
        "fp32": before.top1,
        "int8": after.top1,
        "int8_per_tensor": per_tensor.top1,
        "images": before.images,
        "calibration_images": summary.images,
        "max_infinity_norm": round(summary.max_infinity_norm, 3),
        "mean_kurtosis": round(summary.mean_kurtosis, 3),
        "max_kurtosis": round(summary.max_kurtosis, 3),
    }


def attention(header: Mapping[str, Any]) -> str:
    """Name what a trained model differs in."""
    if header["model"].startswith("clipped") or header["model_kwargs"].get("clip"):
        return "clipped"
    return "softmax" if header["model_kwargs"].get("gate") == "none" else "gated"


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The rows as Markdown."""
    yield "| attention | fp32 top-1 % | int8 top-1 % | int8, one scale a weight | largest infinity norm | kurtosis, mean | kurtosis, largest |"  # noqa: E501
    yield "|---|---|---|---|---|---|---|"
    for r in rows:
        cells = [r["attention"], *(f"{r[k]:.2f} ({r[k] - r['fp32']:+.2f})" for k in ("int8", "int8_per_tensor"))]
        cells.insert(1, f"{r['fp32']:.2f}")
        cells += [f"{r[k]:.1f}" for k in ("max_infinity_norm", "mean_kurtosis", "max_kurtosis")]
        yield f"| {' | '.join(cells)} |"


def write(path: Path, rows: Sequence[Mapping[str, Any]], checkpoint: Path) -> None:
    """Write the rows with the machine, the recipe and the images that training left word of beside a checkpoint."""
    import yaml

    beside = checkpoint.parent / "args.yaml"
    recipe = yaml.safe_load(beside.read_text()) if beside.is_file() else {}
    folder = Path(recipe.get("data_dir") or "", recipe.get("train_split", "train"))
    record = {
        "training_images": sum(1 for path in folder.rglob("*") if path.is_file()) if recipe else None,
        "machine": {**machine("cpu"), "onnxruntime": version("onnxruntime")},
        "recipe": {key: value for key, value in recipe.items() if key not in BESIDE},
        "rows": list(rows),
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
