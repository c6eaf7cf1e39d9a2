"""Models side by side on equal terms: one recipe, the same seeds, one process a run, one table and one plot."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from visionattn.train.build import build_model
from visionattn.train.cli import build, read_yaml, to_yaml
from visionattn.train.config import CompareConfig, TrainConfig
from visionattn.train.cost import count_macs
from visionattn.train.data import find_split
from visionattn.train.errors import ConfigError, DataError, TrainError, require
from visionattn.train.files import write_atomically
from visionattn.train.report import device_name, versions

_OF_A_MODEL = {"model", "model_kwargs", "fuse"}  # what may differ between the recipes
_TRAIN = "import sys; from visionattn.train.compare import run_one; sys.exit(run_one(sys.argv[1]))"


@dataclass(frozen=True)
class Summary:
    """A model over its seeds; the units stand in the names."""

    name: str
    model: str
    seeds: int
    top1: float  # percent on the validation set after the last epoch, mean over the seeds
    spread: float | None  # standard deviation over the seeds
    parameters_m: float
    gmacs: float  # multiply-adds of one image, by 10^9
    images_per_second: float  # in training, median over epochs and seeds
    peak_memory_mb: float  # largest over the seeds
    minutes: float  # of a run, mean over the seeds


def compare(cfg: CompareConfig, overrides: dict[str, Any]) -> list[Summary]:
    """Train every recipe of a folder with every seed, one after the other, and write what came out.

    A run that has finished with the same recipe is not repeated, and one that was interrupted continues.

    Args:
        cfg: what to compare.
        overrides: arguments of training that replace those of all recipes.

    Returns:
        A row for each model all of whose seeds are done.

    Raises:
        ConfigError: the recipes differ in more than the model.
        DataError: there is no data.
        TrainError: a run failed; those before it are recorded.
    """
    recipes = _recipes(cfg, overrides if cfg.data_dir is None else {**overrides, "data_dir": cfg.data_dir})
    folder = Path(cfg.output)
    if cfg.per_class is not None:
        data = _subset(Path(recipes[0][1].data_dir or ""), folder / "data", cfg.per_class, recipes[0][1])
        recipes = [(name, dataclasses.replace(recipe, data_dir=str(data))) for name, recipe in recipes]
    results = Path(cfg.results or folder / "results.json")
    rows = _known(results)
    planned = [(name, dataclasses.replace(recipe, seed=seed)) for seed in cfg.seeds for name, recipe in recipes]
    started, finished = time.monotonic(), 0
    for number, (name, recipe) in enumerate(planned, 1):
        label = f"{number}/{len(planned)} {name}, seed {recipe.seed}"
        if any(row["name"] == name and row["key"] == _key(recipe, cfg) for row in rows):
            print(f"{label}: done before", flush=True)
            continue
        left = None if cfg.time_limit is None else cfg.time_limit - (time.monotonic() - started) / 60
        if left is not None and left <= 0:
            print(f"{label}: no time left; the same command continues here", flush=True)
            break
        rate = f", about {(time.monotonic() - started) / finished / 60:.1f} min a run" if finished else ""
        print(f"{label}{rate}", flush=True)
        row = _run(name, recipe, folder, left, _key(recipe, cfg))
        if row is None:
            print(f"{label}: stopped; the same command continues it", flush=True)
            break
        finished += 1
        rows.append(row)
        _write(results, rows, cfg, recipes[0][1])
    wanted = {(name, _key(recipe, cfg)) for name, recipe in planned}
    summaries = summarise([row for row in rows if (row["name"], row["key"]) in wanted], cfg.seeds)
    if summaries:
        table = to_markdown(summaries)
        print(table)
        write_atomically(results.with_suffix(".md"), lambda file: file.write(table.encode()))
        draw(summaries, results.with_suffix(".png"), cfg.label)
    return summaries


def _recipes(cfg: CompareConfig, overrides: dict[str, Any]) -> list[tuple[str, TrainConfig]]:
    """The recipes of the folder, by name, with the overrides."""
    folder = Path(cfg.configs)
    files = sorted(path for path in folder.glob("*.yaml") if not path.stem.startswith("_"))
    if not files:
        raise ConfigError(f"no recipes: {folder} holds no .yaml files")
    if cfg.only:
        unknown = sorted(set(cfg.only) - {path.stem for path in files})
        if unknown:
            raise ConfigError(f"--only names {', '.join(unknown)}; {folder} has {', '.join(p.stem for p in files)}")
        files = [path for path in files if path.stem in cfg.only]
    found = []
    for path in files:
        values = {**read_yaml(path), **overrides}
        size = values.get("img_size")
        kwargs = values.get("model_kwargs") or {}
        if "img_size" in kwargs and size is not None:  # a model of fixed size is built for the size it gets
            values["model_kwargs"] = {**kwargs, "img_size": int(size)}
        found.append((path.stem, build(TrainConfig, values, source=str(path))))
    first = _common(found[0][1])
    for name, recipe in found[1:]:
        odd = [key for key, value in _common(recipe).items() if value != first[key]]
        if odd:
            raise ConfigError(
                f"not on equal terms: {name} and {found[0][0]} differ in {', '.join(odd)}; recipes to compare may "
                "differ in model, model_kwargs and fuse alone"
            )
    return found


def _common(recipe: TrainConfig) -> dict[str, Any]:
    return {key: value for key, value in vars(recipe).items() if key not in _OF_A_MODEL}


def _key(recipe: TrainConfig, cfg: CompareConfig) -> str:
    """Tells recipes apart by what decides their result."""
    beside = {"output", "experiment", "resume", "overwrite", "progress", "tensorboard", "time_limit", "data_dir"}
    values = {key: value for key, value in vars(recipe).items() if key not in beside}
    values["per_class"] = cfg.per_class
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=list).encode()).hexdigest()[:16]


def _run(name: str, recipe: TrainConfig, folder: Path, minutes: float | None, key: str) -> dict[str, Any] | None:
    """Train in a process of its own; ``None`` when it was stopped in order."""
    experiment = f"{name}-{key}"
    recipe = dataclasses.replace(
        recipe, output=str(folder), experiment=experiment, resume="auto", time_limit=minutes, tensorboard=False
    )
    config = folder / f"{experiment}.yaml"
    write_atomically(config, lambda file: file.write(to_yaml(recipe).encode()))
    code = subprocess.run([sys.executable, "-c", _TRAIN, str(config)], check=False).returncode
    run = folder / experiment
    history = _history(run)
    if code > 128 or (code == 0 and len(history) < recipe.epochs + recipe.cooldown_epochs):
        return None
    if code != 0:
        raise TrainError(f"training {name} failed with status {code}; its messages stand above, its files in {run}")
    classes = read_yaml(run / "args.yaml")["num_classes"]
    model = build_model(recipe.model, num_classes=classes, in_chans=recipe.in_chans, **recipe.model_kwargs)
    size = recipe.img_size or 224
    return {
        "name": name, "model": recipe.model, "model_kwargs": recipe.model_kwargs, "seed": recipe.seed,
        "key": key, "top1": float(history[-1]["eval_top1"]), "loss": float(history[-1]["eval_loss"]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "macs": count_macs(model, (recipe.in_chans, size, size)),
        "images_per_second": statistics.median(float(row["images_per_second"]) for row in history),
        "peak_memory_mb": max(float(row["peak_memory_mb"]) for row in history),
        "seconds": sum(float(row["seconds"]) for row in history), "epochs": len(history),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }  # fmt: skip


def run_one(config: str) -> int:
    """What the process of one run does; returns its exit status, as `tools/train.py` would."""
    from visionattn.train.engine import train

    try:
        result = train(build(TrainConfig, read_yaml(config), source=config))
    except TrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 128 + result.stopped_by if isinstance(result.stopped_by, int) else 0


def _history(run: Path) -> list[dict[str, str]]:
    file = run / "summary.csv"
    return list(csv.DictReader(io.StringIO(file.read_text()))) if file.is_file() else []


def _known(results: Path) -> list[dict[str, Any]]:
    if not results.is_file():
        return []
    try:
        return list(json.loads(results.read_text())["rows"])
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{results} is not a file of results: {error}; move it away, or give --results") from error


def _write(results: Path, rows: list[dict[str, Any]], cfg: CompareConfig, recipe: TrainConfig) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    beside = {"output", "experiment", "resume", "overwrite", "data_dir", "seed", *_OF_A_MODEL}
    record = {
        "label": cfg.label,
        "machine": {"device": device_name(device), "cores": os.cpu_count(), **versions()},
        "images_of_a_class": list(cfg.per_class) if cfg.per_class is not None else "all",
        "recipe": {key: value for key, value in vars(recipe).items() if key not in beside},
        "rows": rows,
    }
    text = json.dumps(record, indent=1, default=list) + "\n"
    write_atomically(results, lambda file: file.write(text.encode()))


def summarise(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> list[Summary]:
    """One row a model, the most accurate first; a model that lacks a seed is left out."""
    found = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name and row["seed"] in seeds]
        if {row["seed"] for row in own} != set(seeds):
            continue
        accuracies = [row["top1"] for row in own]
        found.append(
            Summary(
                name=name, model=own[0]["model"], seeds=len(own), top1=statistics.mean(accuracies),
                spread=statistics.stdev(accuracies) if len(own) > 1 else None,
                parameters_m=own[0]["parameters"] / 1e6, gmacs=own[0]["macs"] / 1e9,
                images_per_second=statistics.median(row["images_per_second"] for row in own),
                peak_memory_mb=max(row["peak_memory_mb"] for row in own),
                minutes=statistics.mean(row["seconds"] for row in own) / 60,
            )
        )  # fmt: skip
    return sorted(found, key=lambda row: -row.top1)


def to_markdown(rows: Sequence[Summary]) -> str:
    """The table."""
    lines = [
        "| recipe | top-1 (%) | parameters (M) | multiply-adds (G) | images/s | peak memory (MB) | time (min) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = f" ± {row.spread:.2f}" if row.spread is not None else ""
        lines.append(
            f"| {row.name} | {row.top1:.2f}{spread} | {row.parameters_m:.2f} | {row.gmacs:.3f} | "
            f"{row.images_per_second:.0f} | {row.peak_memory_mb:.0f} | {row.minutes:.1f} |"
        )
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Summary], path: Path, title: str) -> None:
    """Accuracy over speed, a point a model, its size the number of parameters.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require("matplotlib", "the plot of a comparison")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        axes.errorbar(
            row.images_per_second, row.top1, yerr=row.spread, fmt="o", markersize=4 + 3 * row.parameters_m**0.5,
            alpha=0.8, capsize=3,
        )  # fmt: skip
        place = (row.images_per_second, row.top1)
        axes.annotate(row.name, place, xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="images a second in training", ylabel="top-1 on the validation set (%)", xscale="log")
    axes.set_title(textwrap.fill(title, 80), fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.12)  # for the last name
    axes.grid(alpha=0.3)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def _subset(root: Path, target: Path, counts: tuple[int, ...], recipe: TrainConfig) -> Path:
    """A folder of links to the first images of each class, for training and for validation."""
    if recipe.dataset != "" or not recipe.data_dir:
        raise ConfigError("--per-class takes the first images of class folders: give the --data-dir of such folders")
    chosen = target / "-".join(map(str, counts))
    for split, count, name in ((recipe.train_split, counts[0], "train"), (recipe.val_split, counts[1], "validation")):
        for source in sorted(path for path in find_split(root, split).iterdir() if path.is_dir()):
            files = sorted(path for path in source.iterdir() if path.is_file())[:count]
            if len(files) < count:
                raise DataError(f"{source} has {len(files)} images, --per-class asks for {count}")
            folder = chosen / name / source.name
            folder.mkdir(parents=True, exist_ok=True)
            for file in files:
                if not (folder / file.name).is_symlink():
                    (folder / file.name).symlink_to(file.resolve())
    return chosen
