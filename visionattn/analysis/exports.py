"""What exports: every model in every format by the command line, one row each, with what stopped those that do not."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from visionattn.analysis.export import FORMATS, OPEN_SIZE

# What can be asked of each format: an open batch, or open H and W too.
KINDS = tuple((f, d) for f in FORMATS for d in ("batch", "batch,size") if d == "batch" or f in OPEN_SIZE)
KEYS = ("model", "format", "dynamic")
SAME = ("torch", "timm", "visionattn", "python")  # of the machine: what the rows of one file share

Log = Callable[[str], None]


@dataclass(frozen=True)
class ExportRow:
    """One model in one format: what `tools/export.py` said of the file, or why there is none."""

    model: str
    format: str
    dynamic: str  # "batch" or "batch,size"
    megabytes: float | None = None
    largest_error: float | None = None  # over the largest value
    smallest: int | None = None  # the least H and W, where they are open
    stopped: str = ""  # the error, if the file was not written


def survey(
    tool: Path, models: Sequence[str], kinds: Iterable[tuple[str, str]] = KINDS, *,
    known: Sequence[Mapping[str, Any]] = (), limit_s: float = 900.0, jobs: int = 1, log: Log = print,
) -> Iterator[ExportRow]:  # fmt: skip
    """Export models of random weights by ``tools/export.py``, each in a process of its own, and keep none of the files.

    Args:
        tool: The path of ``tools/export.py``.
        models: Registered names.
        kinds: Pairs of a format and what is left open; see `KINDS`.
        known: Rows that exist already and are not made again.
        limit_s: Seconds after which an export is stopped.
        jobs: How many run at once; they share the cores.
        log: Told what has ended.
    """
    done = {tuple(row[k] for k in KEYS) for row in known}
    wanted = [key for key in ((m, f, d) for f, d in kinds for m in models) if key not in done]
    threads = max(1, torch.get_num_threads() // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(_export, tool, *key, limit_s, threads) for key in wanted]
        try:
            for number, future in enumerate(as_completed(futures), 1):
                row, seconds = future.result()
                how = row.stopped or f"off by {row.largest_error:.0e}"
                log(f"{number} of {len(wanted)}: {row.model}, {row.format}, {row.dynamic}: {how}, {seconds:.0f} s")
                yield row
        finally:
            pool.shutdown(cancel_futures=True)


def _export(tool: Path, model: str, format: str, dynamic: str, limit_s: float, threads: int) -> tuple[ExportRow, float]:
    """Return the row, and the seconds that it took."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="export-") as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, str(tool), model, "--format", format, "--dynamic", dynamic]
        command += ["--out", str(Path(folder) / "model"), "--report", str(report)]
        try:
            ended = subprocess.run(
                command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True,
                timeout=limit_s, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return ExportRow(model, format, dynamic, stopped=f"not finished in {limit_s:g} s"), limit_s
        seconds = time.perf_counter() - begun
        if ended.returncode:
            lines = [*ended.stderr.strip().splitlines(), f"exit status {ended.returncode}"]
            why = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[-1])
            return ExportRow(model, format, dynamic, stopped=why), seconds
        said = json.loads(report.read_text())
    told = {key: said[key] for key in ("megabytes", "largest_error", "smallest")}
    return ExportRow(model, format, dynamic, **told), seconds
