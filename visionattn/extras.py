"""Optional packages: imported where they are used, and where one is missing, the extra that brings it is named."""

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """A package of an optional extra is not installed."""


def require(module: str, purpose: str, install: str) -> ModuleType:
    """Import an optional module, or say which extra brings it.

    Args:
        module: Dotted name to import.
        purpose: What needs it, as the beginning of a sentence ("the digits data set").
        install: What to hand to ``pip install``.

    Raises:
        MissingExtraError: The module is not installed.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != package:
            raise  # the module is there, something inside it is not: not ours to explain
        raise MissingExtraError(f"{purpose} needs the package {package!r}: pip install '{install}'") from error
