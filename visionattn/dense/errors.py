"""Errors that a user can mend: each message says what was given, what was expected and what to do."""

from visionattn.models import CheckpointError


class DenseError(Exception):
    """Base of every error below; the command lines print its message alone."""


class BackboneError(DenseError, ValueError):
    """Arguments of a backbone, detector or optimiser that do not fit the model."""


class ConfigError(DenseError, ValueError):
    """A configuration that cannot be read or run."""


class DatasetError(DenseError, ValueError):
    """A dataset that cannot be trained on; the message lists what is wrong with it."""


class WeightsError(DenseError, CheckpointError):
    """A weight file that is unsafe, unreadable or made for something else."""
