"""Errors that a user can mend: each message says what was given, what was expected and what to do.

The command lines print the message of a `TrainError` alone; anything else is our mistake and keeps its traceback.
"""

from __future__ import annotations

from types import ModuleType

from visionattn import extras, models


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


class MissingDependencyError(TrainError, extras.MissingExtraError):
    """A package of an optional extra is not installed."""


def require(module: str, purpose: str, install: str = "visionattn[train]") -> ModuleType:
    """Import an optional module as `visionattn.extras.require` does.

    Raises:
        MissingDependencyError: the module is not installed.
    """
    try:
        return extras.require(module, purpose, install)
    except extras.MissingExtraError as error:
        raise MissingDependencyError(str(error)) from error
