"""Errors that a user can mend: each message says what was given, what was expected and what to do.

The command lines print the message of a `TrainError` alone; anything else is our mistake and keeps its traceback.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from visionattn import models


class TrainError(Exception):
    """Base of every error below."""


class ConfigError(TrainError, ValueError):
    """An unknown argument, a value of the wrong type, or values that contradict each other."""


class DataError(TrainError, ValueError):
    """A missing or empty data set, classes that do not match, or too many unreadable images."""


class CheckpointError(TrainError, models.CheckpointError):
    """A checkpoint that cannot be read, does not fit the model, or could not be written."""


class NonFiniteLossError(TrainError, ArithmeticError):
    """The training loss became NaN or infinite."""


class MissingDependencyError(TrainError, ImportError):
    """A package of an optional extra is not installed."""


def require(module: str, purpose: str, install: str = "visionattn[train]") -> ModuleType:
    """Import an optional module, or say which extra brings it.

    Args:
        module: dotted name to import.
        purpose: what needs it, as the beginning of a sentence ("the digits data set").
        install: what to hand to ``pip install``.

    Raises:
        MissingDependencyError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != module.partition(".")[0]:
            raise  # the module is there, something inside it is not: not ours to explain
        raise MissingDependencyError(
            f"{purpose} needs the package {module.partition('.')[0]!r}: pip install '{install}'"
        ) from error
