"""Runs of `tools/train.py` in processes of their own; they begin in a blink: a fork server has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import resource
import runpy
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from visionattn.train import TrainConfig
from visionattn.train.cli import to_yaml

TOOL = Path(__file__).parents[2] / "tools" / "train.py"
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["visionattn.train", "timm.models"])


def start(cfg: TrainConfig, log: Path, *, largest_file: int | None = None) -> BaseProcess:
    """Start a run; its standard output and errors go to ``log``.

    Args:
        cfg: what to run.
        log: is written anew.
        largest_file: bytes beyond which a write fails, as on a full disk.
    """
    config = log.with_suffix(".yaml")
    config.write_text(to_yaml(cfg))
    process = _CONTEXT.Process(target=_run, args=(str(config), str(log), largest_file))
    process.start()
    return process


def _run(config: str, log: str, largest_file: int | None) -> None:
    with Path(log).open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of loading processes, as in a run from a shell
    sys.argv = [str(TOOL), config]
    runpy.run_path(str(TOOL), run_name="__main__")
