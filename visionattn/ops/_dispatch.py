"""How an operator chooses among its implementations.

An implementation is a module with two functions of the operator's own tensors and options:
``why_not(...)`` returns the reason for which it cannot take this input, or None, and ``forward(...)`` computes.
"""

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Literal, get_args

import torch

from visionattn.ops import _crossovers

Impl = Literal["auto", "reference", "eager", "triton", "natten", "flex"]
IMPLS: tuple[str, ...] = get_args(Impl)[1:]
PLAIN = ("eager", "reference")  # PyTorch's own operators: what exporters can trace

# Read once: a graph that is being compiled cannot look for packages.
_HAS = {name: importlib.util.find_spec(name) is not None for name in ("triton", "natten")}
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels on the CPU, slowly: for tests

_default: str = "auto"


class UnsupportedError(NotImplementedError):
    """An implementation that was asked for by name cannot take the input; the message says why."""


def set_impl(impl: Impl) -> None:
    """Set the implementation that every operator called with ``impl="auto"`` uses, in the whole process.

    Args:
        impl: ``"auto"`` (choose by input) or the name of one implementation, which then runs or raises.

    Raises:
        ValueError: ``impl`` is not a known name.
    """
    global _default
    if impl != "auto" and impl not in IMPLS:
        raise ValueError(f"unknown impl={impl!r}; known: auto, {', '.join(IMPLS)}")
    _default = impl


def get_impl() -> str:
    """Return the name last given to `set_impl`."""
    return _default


@contextmanager
def use_impl(impl: Impl) -> Iterator[None]:
    """Use one implementation for every operator inside a ``with`` block; see `set_impl`."""
    before = _default
    set_impl(impl)
    try:
        yield
    finally:
        set_impl(before)  # type: ignore[arg-type]


def set_autotune(on: bool) -> None:
    """Let Triton's kernels be timed at each of their few configurations, once for each kind of input, on a GPU.

    The fastest is kept, also for later processes. Off by default: results then do not depend on timings.

    Raises:
        UnsupportedError: Triton cannot run here; the message says why.
    """
    why = missing("triton")
    if why is not None:
        raise UnsupportedError(f"there is nothing to tune: {why}")
    from visionattn.kernels import _launch

    _launch.set_autotune(on)


def exporting() -> bool:
    """Whether a tracer that knows PyTorch's operators alone is recording (torch.export, ONNX, torch.jit.trace)."""
    # The flag, not torch.compiler.is_exporting(): Dynamo folds that to True for torch.compile as well.
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()


def open_size(*sizes: int) -> bool:
    """Whether an exporter leaves one of these sizes open: no branch may then depend on it."""
    return exporting() and any(isinstance(size, torch.SymInt) for size in sizes)


def missing(impl: str) -> str | None:
    """Return why ``impl`` cannot run in this process whatever the input, or None if it can."""
    if impl == "triton":
        if not _HAS["triton"]:
            return "triton is not installed"
        if not (torch.cuda.is_available() or INTERPRET):
            return "no GPU here, and TRITON_INTERPRET=1 (kernels on the CPU, slowly) is not set"
    if impl == "natten":
        if not _HAS["natten"]:
            return "natten is not installed: pip install visionattn[natten]"
        if not torch.cuda.is_available():
            return "NATTEN's kernels need a GPU"
    if impl == "flex" and not torch.cuda.is_available():
        return "FlexAttention is used on GPUs alone"
    return None


def choose(op: str, impl: str, known: Mapping[str, ModuleType], *args: Any, **kwargs: Any) -> ModuleType:
    """Return the implementation that runs: the one named, or the first that takes the input, as they were measured.

    Args:
        op: The operator's name, for messages.
        impl: What the caller asked for.
        known: Implementations by name, in the order for an input that was not measured, the reference last.
        *args: Handed to each ``why_not``; the queries come first.
        **kwargs: Handed to each ``why_not``.

    Raises:
        ValueError: ``impl`` is not a known name.
        UnsupportedError: The named implementation does not exist for ``op`` or refuses the input.
    """
    if impl == "auto":
        impl = _default
    if impl == "auto":
        # Asked in few words, since small calls on the CPU take microseconds. Nothing but plain PyTorch is chosen there:
        # the interpreter of kernels is too slow.
        plain_only = args[0].is_cpu or INTERPRET or exporting()
        for name in _crossovers.ranked(op, known, args[0]) if _crossovers.RANKS and not exporting() else known:
            if name not in PLAIN and (plain_only or missing(name) is not None):
                continue
            if known[name].why_not(*args, **kwargs) is None:
                return known[name]
        raise UnsupportedError(f"{op}: no implementation takes this input: {_reasons(known, *args, **kwargs)}")
    if impl not in IMPLS:
        raise ValueError(f"{op}: unknown impl={impl!r}; known: auto, {', '.join(IMPLS)}")
    if impl not in known:
        raise UnsupportedError(f"{op}: there is no impl={impl!r}; there are: auto, {', '.join(known)}")
    why = missing(impl) or known[impl].why_not(*args, **kwargs)
    if why is not None:
        raise UnsupportedError(f"{op}: impl={impl!r} refuses: {why}")
    return known[impl]


def _reasons(known: Mapping[str, ModuleType], *args: Any, **kwargs: Any) -> str:
    return "; ".join(f"{name}: {missing(name) or m.why_not(*args, **kwargs)}" for name, m in known.items())
