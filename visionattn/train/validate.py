"""Evaluate a checkpoint: one written by `visionattn.train`, which knows its model and data, or an official one."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from visionattn.train.benchmarks import Benchmark, real_labels
from visionattn.train.build import build_model, resolve_data
from visionattn.train.checkpoint import WeightsInfo, load_model, load_weights, read_info
from visionattn.train.cli import read_yaml
from visionattn.train.config import ValidateConfig
from visionattn.train.data import DataConfig, check_classes, class_names, open_dataset, val_loader
from visionattn.train.errors import ConfigError
from visionattn.train.evaluate import Unreadable, evaluate
from visionattn.train.files import write_atomically


def validate(cfg: ValidateConfig) -> dict[str, Any]:
    """Evaluate a model on a data set, and write ``cfg.results_file`` when it is set.

    Returns:
        ``model``, ``checkpoint``, ``dataset``, ``split``, ``top1`` and ``top5`` in percent, ``loss``, ``samples``,
        ``unreadable`` (files left out), ``images_per_second`` and the preprocessing used.

    Raises:
        TrainError: something the user can mend; its message says what.
    """
    accelerator = Accelerator(mixed_precision="no" if cfg.amp == "none" else cfg.amp)
    result = Subject(cfg, accelerator).evaluate()
    if cfg.results_file is not None and accelerator.is_main_process:
        write_rows(Path(cfg.results_file), [result])
    return result


class Subject:
    """A model with weights, ready to be evaluated.

    Args:
        cfg: names one model or checkpoint.
        accelerator: of the process.

    Raises:
        TrainError: the model cannot be had; the message says why.
    """

    def __init__(self, cfg: ValidateConfig, accelerator: Accelerator) -> None:
        self.cfg, self.accelerator = cfg, accelerator
        self.info = read_info(cfg.checkpoint) if cfg.checkpoint is not None else None
        model = _model(cfg, self.info)
        self.data = _preprocessing(cfg, self.info, model)
        model = model.to(accelerator.device)
        if cfg.channels_last:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if cfg.torchcompile is not None:
            model.compile(backend=cfg.torchcompile)
        self.model = model

    def evaluate(self, benchmark: Benchmark | None = None) -> dict[str, Any]:
        """Evaluate on one of ImageNet's sets, or on the data set of the configuration."""
        cfg, info, accelerator = self.cfg, self.info, self.accelerator
        dataset, name, split = self._open(benchmark)
        outputs = getattr(self.model, "num_classes", None)
        classes = class_names(dataset)
        if classes is not None and outputs is not None and len(classes) > outputs:
            raise ConfigError(f"the data set has {len(classes)} classes, the model {outputs}")
        loader = val_loader(
            dataset, self.data, batch_size=cfg.batch_size, workers=cfg.workers, rank=accelerator.process_index,
            world=accelerator.num_processes, pin=torch.cuda.is_available(), max_bad=cfg.max_bad_images,
        )  # fmt: skip
        unreadable = Unreadable(cfg.max_bad_images)
        accepted = None
        if benchmark is not None and benchmark.real:
            accepted = real_labels([str(name) for name in dataset.filenames(basename=True)], int(outputs or 0))
        figures = evaluate(
            self.model, loader, accelerator, unreadable=unreadable, channels_last=cfg.channels_last,
            progress=cfg.progress, label=split, columns=benchmark.columns if benchmark is not None else None,
            accepted=accepted,
        )  # fmt: skip
        for text in unreadable.names:
            accelerator.print(f"left out an unreadable image: {text}")
        return {
            "model": info.model if info is not None and cfg.model is None else cfg.model,
            "checkpoint": cfg.checkpoint,
            "dataset": name or "image folder",
            "split": split,
            **{key: round(value, 6) for key, value in figures.items()},
            "unreadable": len(unreadable.names),
            "amp": cfg.amp,
            **{key: list(value) if isinstance(value, tuple) else value for key, value in self.data._asdict().items()},
        }

    def _open(self, benchmark: Benchmark | None) -> tuple[Any, str, str]:
        """The data set, its name, and its split or which of ImageNet's sets it is."""
        cfg, info = self.cfg, self.info
        if benchmark is not None:
            dataset = open_dataset(
                "", str(benchmark.folder), ".", training=False, in_chans=self.data.input_size[0],
                class_map=benchmark.class_map,
            )  # fmt: skip
            check_classes(list(benchmark.class_map), dataset, f"the set {benchmark.name!r}", "ImageNet")
            return dataset, "", benchmark.name
        name = cfg.dataset if cfg.dataset is not None else info.dataset if info is not None else ""
        split = cfg.split or (info.val_split if info is not None else "validation")
        known = info.class_names if info is not None else None
        class_map: Any = cfg.class_map
        if class_map is None and known is not None and name == "":
            class_map = {label: index for index, label in enumerate(known)}
        dataset = open_dataset(
            name, cfg.data_dir or _remembered_data_dir(cfg), split, training=False, in_chans=self.data.input_size[0],
            class_map=class_map, num_samples=cfg.num_samples, input_key=cfg.input_key, target_key=cfg.target_key,
            download=cfg.dataset_download, batch_size=cfg.batch_size,
        )  # fmt: skip
        check_classes(known, dataset, "the data set", "the checkpoint")
        return dataset, name, split


def _model(cfg: ValidateConfig, info: WeightsInfo | None) -> nn.Module:
    if info is not None and cfg.model is None and not cfg.model_kwargs:
        return load_model(str(cfg.checkpoint))[0]
    name = cfg.model or (info.model if info is not None else None)
    if name is None:
        raise ConfigError(f"{cfg.checkpoint} does not say which model it belongs to: give --model NAME")
    kwargs = {**(info.model_kwargs if info is not None else {}), **cfg.model_kwargs}
    classes = cfg.num_classes if cfg.num_classes is not None else info.num_classes if info is not None else None
    model = build_model(name, pretrained=cfg.pretrained, num_classes=classes, **kwargs)
    if cfg.checkpoint is not None:
        load_weights(model, cfg.checkpoint)
    return model.eval()


def _preprocessing(cfg: ValidateConfig, info: WeightsInfo | None, model: nn.Module) -> DataConfig:
    """From the arguments where they say, then from the checkpoint, then from the model."""
    if info is None:
        return resolve_data(model, cfg, 3)
    saved = {key: getattr(info, key) for key in DataConfig._fields}
    if cfg.img_size is not None:
        saved["input_size"] = [info.in_chans, cfg.img_size, cfg.img_size]
    filled: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in saved.items() if getattr(cfg, key) is None
    }
    return resolve_data(model, dataclasses.replace(cfg, **filled), info.in_chans)


def _remembered_data_dir(cfg: ValidateConfig) -> str | None:
    """The data folder that the training run wrote to `args.yaml` beside its checkpoints."""
    beside = Path(cfg.checkpoint).parent / "args.yaml" if cfg.checkpoint is not None else None
    return read_yaml(beside).get("data_dir") if beside is not None and beside.is_file() else None


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write results as .json (one row alone as an object) or .csv."""
    if path.suffix == ".json":
        text = json.dumps(rows[0] if len(rows) == 1 else rows, indent=2) + "\n"
    else:
        table = io.StringIO()
        writer = csv.DictWriter(table, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        text = table.getvalue()
    write_atomically(path, lambda file: file.write(text.encode()))
