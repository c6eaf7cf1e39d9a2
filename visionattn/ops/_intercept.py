"""Stand between operators and their implementations, for counting and for looking."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from visionattn.ops import OPERATORS, use_impl


@contextmanager
def intercepted(wrap: Callable[[str, ModuleType], Any]) -> Iterator[None]:
    """Let every operator run on ``wrap(operator, implementation)`` instead of each of its implementations.

    Unless a layer names another, the reference is the one that is wrapped and run.

    Args:
        wrap: Returns what stands in for an implementation: an object with ``why_not`` and ``forward``.
    """
    known = {op: importlib.import_module(f"visionattn.ops.{op}").IMPLS for op in OPERATORS}
    before = {op: dict(impls) for op, impls in known.items()}
    try:
        for op, impls in known.items():
            impls.update({name: wrap(op, module) for name, module in before[op].items()})
        with use_impl("reference"):
            yield
    finally:
        for op, impls in known.items():
            impls.update(before[op])
