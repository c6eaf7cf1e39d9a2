"""Several models on several of ImageNet's sets, in one table that grows row by row and is never computed twice."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from visionattn.train.benchmarks import Benchmark, open_benchmarks
from visionattn.train.config import ValidateConfig
from visionattn.train.errors import CheckpointError, ConfigError
from visionattn.train.files import write_atomically
from visionattn.train.validate import Subject, write_rows


def validate_table(cfg: ValidateConfig) -> list[dict[str, Any]]:
    """Evaluate every model of ``cfg`` on every set of ``cfg``; rows that ``cfg.results_file`` holds are not repeated.

    The file is written after each row: as .json or .csv with a row for each model and set, or as .md with a row for
    each model, and then the rows beside it in a .json.

    Returns:
        All rows asked for: `subject` (a model's name or a checkpoint's file), `set`, and what `validate` returns.

    Raises:
        TrainError: something the user can mend; its message says what.
    """
    benchmarks = open_benchmarks(cfg.sets)
    accelerator = Accelerator(mixed_precision="no" if cfg.amp == "none" else cfg.amp)
    shown = Path(cfg.results_file) if cfg.results_file is not None else None
    file = shown.with_suffix(".json") if shown is not None and shown.suffix == ".md" else shown
    known = _read(file) if file is not None and file.is_file() else []
    rows = []
    for label, one in _subjects(cfg):
        identity = _identity(one)
        subject: Subject | None = None
        for benchmark in benchmarks:
            key = {"subject": label, "set": benchmark.name, "weights": identity, **_asked(cfg)}
            row = next((row for row in known if all(str(row.get(k, "")) == str(key[k]) for k in key)), None)
            if row is None:
                subject = subject or Subject(one, accelerator)
                row = {**key, **_evaluate(subject, benchmark)}
                known.append(row)
                if file is not None and accelerator.is_main_process:
                    write_rows(file, known)
            accelerator.print(f"{label} on {benchmark.name}: top1 {float(row['top1']):.2f} %")
            rows.append(row)
    if shown is not None and shown.suffix == ".md" and accelerator.is_main_process:
        text = to_markdown(rows)
        write_atomically(shown, lambda out: out.write(text.encode()))
    return rows


def _subjects(cfg: ValidateConfig) -> Iterator[tuple[str, ValidateConfig]]:
    """Each model alone, with what it is called in the table."""
    common: dict[str, Any] = {"models": (), "checkpoints": (), "sets": {}, "results_file": None}
    for path in (*cfg.checkpoints, *((cfg.checkpoint,) if cfg.checkpoint is not None else ())):
        yield path, dataclasses.replace(cfg, **common, checkpoint=path, pretrained=False)
    single = (cfg.model,) if cfg.model is not None and cfg.checkpoint is None and not cfg.checkpoints else ()
    for name in (*cfg.models, *single):
        yield name, dataclasses.replace(cfg, **common, model=name, checkpoint=None, pretrained=True)


def _identity(one: ValidateConfig) -> str:
    """Tells a checkpoint from another under the same name."""
    if one.checkpoint is None:
        return "published"
    path = Path(one.checkpoint)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()[:16]


def _asked(cfg: ValidateConfig) -> dict[str, Any]:
    """What the command line says about the preprocessing."""
    return {"asked": f"size {cfg.img_size or cfg.input_size}, crop {cfg.crop_pct} {cfg.crop_mode}, amp {cfg.amp}"}


def _evaluate(subject: Subject, benchmark: Benchmark) -> dict[str, Any]:
    row = subject.evaluate(benchmark)
    return {key: value for key, value in row.items() if key not in ("dataset", "split")}


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        if file.suffix == ".csv":
            return list(csv.DictReader(file.read_text().splitlines()))
        rows = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} is not a table of results: {error}; name another --results-file") from error
    return [rows] if isinstance(rows, dict) else rows


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """A row a model, a column a set: top-1 in percent; ImageNet-C is the mean over corruptions and severities."""
    columns = list(dict.fromkeys(str(row["set"]).partition("/")[0] for row in rows))
    lines = [f"| model | size | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for label in dict.fromkeys(row["subject"] for row in rows):
        own = [row for row in rows if row["subject"] == label]
        cells = []
        for column in columns:
            found = [float(row["top1"]) for row in own if str(row["set"]).partition("/")[0] == column]
            cells.append(f"{statistics.mean(found):.2f}" if found else "")
        size = own[0]["input_size"]
        side = size[-1] if isinstance(size, list) else json.loads(str(size))[-1]
        lines.append(f"| {label} | {side} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
