"""Files that are whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

from visionattn.train.errors import CheckpointError


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then put it in place in one step.

    Raises:
        CheckpointError: the file could not be written; what was at ``path`` before is still there.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        part.unlink(missing_ok=True)
        raise CheckpointError(f"could not write {path}: {error}; files written before are intact") from error


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder outlive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_parts(folder: Path) -> None:
    """Remove the half-written files that a killed process left in a folder."""
    for part in folder.glob(".*.part"):
        remove(part)


def remove(path: Path) -> None:
    """Remove a file, or a folder with what is in it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
