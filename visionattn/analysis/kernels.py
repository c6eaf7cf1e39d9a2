"""Kernels on a GPU: whether they are right there, and how near they come to what the GPU can do."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from visionattn.analysis.bench import DIRECTIONS, DTYPES, Case, Row, Run, fits, measure, seconds
from visionattn.ops import UnsupportedError, use_impl
from visionattn.ops._dispatch import missing
from visionattn.testing import assert_within_budget, value_and_grads

ELEMENTS = 2**24  # of the queries: 32 MB in half precision, more work than a GPU's launch overhead


def on_impl(run: Run, impl: str) -> Run:
    """Return ``run`` with every operator on one implementation."""

    def call(*tensors: Tensor) -> Tensor:
        with use_impl(impl):  # type: ignore[arg-type]
            return run(*tensors)

    return call


def compiled_reference(run: Run) -> Run:
    """Return what ``torch.compile`` makes of the operator's definition."""
    return torch.compile(on_impl(run, "reference"), dynamic=False)


def implementations(case: Case, tensors: Sequence[Tensor]) -> dict[str, str | None]:
    """Return the implementations of a case's operator but the reference; with each, why it cannot run here or None."""
    known = importlib.import_module(f"visionattn.ops.{case.operator}").IMPLS
    return {impl: missing(impl) or _refusal(case, impl, tensors) for impl in known if impl != "reference"}


def _refusal(case: Case, impl: str, tensors: Sequence[Tensor]) -> str | None:
    try:
        on_impl(case.run, impl)(*tensors)
    except UnsupportedError as e:
        return str(e)
    return None


def check(case: Case, *, device: str, dtypes: Sequence[str] = tuple(DTYPES)) -> Iterator[str]:
    """Hold every implementation of a case to the error budget, and run it twice.

    Output and gradients must be within twice the reference's own error against float64 (so that products rounded to
    TF32 show), and must not differ between two runs by a bit (so that races show).

    Yields:
        A line for each implementation and dtype that passed or was refused.

    Raises:
        AssertionError: an implementation is wrong or not deterministic; the message says which.
    """
    inputs = [x.to(device) for x in case.inputs()]
    for name in dtypes:
        tensors = [x.to(DTYPES[name]) if x.is_floating_point() else x for x in inputs]
        for impl, why in implementations(case, tensors).items():
            label = f"{case.operator}, {case.shape}, {name}, {impl}"
            if why is not None:
                yield f"{label}: not run: {why}"
                continue
            run = on_impl(case.run, impl)
            try:
                assert_within_budget(run, on_impl(case.run, "reference"), tensors, dtype=DTYPES[name])
            except AssertionError as e:
                raise AssertionError(f"{label}: {e}") from e
            first, second = (value_and_grads(run, tensors, DTYPES[name]) for _ in range(2))
            if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
                raise AssertionError(f"{label}: two runs on the same input differ")
            yield f"{label}: right"


def race(
    case: Case, *, device: str, dtype: str, rounds: int, rivals: bool = True, note: Callable[[str], None] = print
) -> list[Row]:
    """Race every implementation of a case, its compiled definition and what else a user would pick.

    Args:
        case: The operator and its shape.
        device: ``"cpu"`` or ``"cuda"``.
        dtype: A key of `visionattn.analysis.bench.DTYPES`.
        rounds: Times that each contestant is measured, in turn.
        rivals: Race what is no implementation of the library as well, besides the authors' formulation.
        note: Is told of a contestant that was left out, and why.
    """
    tensors = [x.to(device, DTYPES[dtype]) if x.is_floating_point() else x.to(device) for x in case.inputs()]
    contestants: dict[str, Run] = {}
    if rivals:
        contestants = {**case.others, **(case.gpu_others if device == "cuda" else {})}
    for impl, why in implementations(case, tensors).items():
        if why is None:
            contestants[impl] = on_impl(case.run, impl)
        else:
            note(f"{case.operator}, {case.shape}, {dtype}: {impl} left out: {why}")
    if rivals:
        contestants["reference, compiled"] = compiled_reference(case.run)
    for name, run in list(contestants.items()):
        if not fits(run, *tensors):
            note(f"{case.operator}, {case.shape}, {dtype}: {name} left out: the device's memory is too small for it")
            del contestants[name]
    moved = {direction: work(case, tensors, direction) for direction in DIRECTIONS}
    rows = measure(replace(case, others=contestants), device=device, dtype=dtype, rounds=rounds)
    return [
        replace(
            row,
            gb_per_s=round(moved[row.direction][0] / row.ms / 1e6, 2),
            tflop_per_s=round(moved[row.direction][1] / row.ms / 1e9, 3),
        )
        for row in rows
    ]


def repeated(case: Case, elements: int = ELEMENTS) -> Case:
    """Return a case whose inputs are repeated along their batch axis until the first has ``elements``: a busy GPU."""
    times = max(1, elements // case.inputs()[0].numel())

    def inputs() -> list[Tensor]:
        return [x if i in case.unbatched else x.repeat(times, *[1] * (x.ndim - 1)) for i, x in enumerate(case.inputs())]

    return replace(case, inputs=inputs, shape=f"{case.shape}, batch x {times}")


def ceilings(device: str, megabytes: int = 1024, side: int = 8192) -> dict[str, float]:
    """Measure what the device can do: GB/s of a copy (read and written) and TFLOP/s of matrix products by dtype.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        megabytes: Size of what is copied; more than any cache.
        side: Of the square matrices.
    """
    source = torch.empty(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"copy_gb_per_s": 2 * source.numel() / seconds(lambda: target.copy_(source), device) / 1e9}
    for name, dtype in DTYPES.items():
        a = torch.randn(side, side, dtype=dtype, device=device)
        found[f"matmul_tflop_per_s_{name}"] = 2 * side**3 / seconds(partial(torch.matmul, a, a), device) / 1e12
    return {key: round(value, 3) for key, value in found.items()}


def work(case: Case, tensors: Sequence[Tensor], direction: str) -> tuple[int, int]:
    """Return the fewest bytes that one call must move, and the floating point operations of the definition.

    Bytes are those of inputs and output, and going back of the inputs again, of the output's gradient and of all
    gradients. Operations are counted in the matrix products of the reference, forward and backward.
    """
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in tensors]
    with FlopCounterMode(display=False) as counter:
        out = on_impl(case.run, "reference")(*leaves)
        if direction != "forward":
            out.sum().backward()
    ins, outs = sum(x.nbytes for x in tensors), out.nbytes
    return ins + outs + (2 * ins + outs if direction != "forward" else 0), counter.get_total_flops()
