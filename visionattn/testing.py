"""What tests and benchmarks of operators share: inputs, the float64 error budget, poisoned memory.

A fast implementation is right when its error against float64 is no more than twice that of the plain reference in
the same dtype, in the largest and in the mean error, for the output and for every gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Run = Callable[..., Tensor]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Standard normal numbers, drawn on the CPU in float64 so that they are the same on every device."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=gen, dtype=torch.float64).to(device, dtype)


def non_contiguous(x: Tensor) -> Tensor:
    """The same values behind strides that no fresh tensor has."""
    wide = x.new_empty(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x
    return wide[..., ::2]


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill fresh memory with NaN, so that an element which a kernel forgot to write shows."""
    mode: Any = torch.utils.deterministic  # its switch is a property of the module
    fill = mode.fill_uninitialized_memory
    on, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    mode.fill_uninitialized_memory = True
    try:
        yield
    finally:
        mode.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(on, warn_only=warn)


def value_and_grads(run: Run, tensors: Sequence[Tensor], dtype: torch.dtype, seed: int = 1) -> list[Tensor]:
    """Run in ``dtype`` and return the output and the gradient of each floating tensor for one random cotangent."""
    moved = [x.detach().to(dtype) if x.is_floating_point() else x for x in tensors]
    leaves = [x.requires_grad_() for x in moved if x.is_floating_point()]
    out = run(*moved)
    cotangent = randn(*out.shape, seed=seed, device=str(out.device), dtype=dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def assert_within_budget(
    run: Run,
    reference: Run,
    tensors: Sequence[Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    names: Sequence[str] = (),
    factor: float = 2.0,
) -> None:
    """Hold ``run`` to ``factor`` times the reference's own rounding error, output and gradients.

    Args:
        run: The implementation under test, a function of ``tensors``.
        reference: The definition, a function of ``tensors`` that also runs in float64.
        tensors: Inputs; floating ones are cast and get gradients, others are passed on.
        dtype: Precision of the comparison.
        names: Names of the floating tensors, for messages.
        factor: Allowed multiple of the reference's error in ``dtype``.

    Raises:
        AssertionError: the largest or the mean error is over budget; the message gives both.
    """
    rounded = [x.to(dtype) if x.is_floating_point() else x for x in tensors]
    with poisoned():
        actual = value_and_grads(run, rounded, dtype)
    exact = value_and_grads(reference, rounded, torch.float64)
    plain = value_and_grads(reference, rounded, dtype)
    labels = ["output", *(f"gradient of {n}" for n in names or range(len(exact) - 1))]
    eps = torch.finfo(dtype).eps
    whole = max((e.abs().max().item() for e in exact if e.numel()), default=0.0)
    for label, a, e, p in zip(labels, actual, exact, plain, strict=True):
        assert a.shape == e.shape, f"{label}: shape {tuple(a.shape)}, expected {tuple(e.shape)}"
        assert a.dtype == dtype, f"{label}: dtype {a.dtype}, expected {dtype}"
        if e.numel() == 0:
            continue
        size = e.abs().max().item()
        if size <= eps * whole:  # zero in exact arithmetic, where sums of larger terms cancel
            size = whole
        for kind, reduce in (("largest", torch.amax), ("mean", torch.mean)):
            error = reduce((a.double() - e).abs()).item()
            usual = reduce((p.double() - e).abs()).item()
            budget = factor * usual + (4 * eps if kind == "largest" else eps) * size
            assert error <= budget, f"{label}: {kind} error {error:.3g} over the budget {budget:.3g} ({dtype})"


def check_operator(
    run: Run,
    reference: Run,
    tensors: Sequence[Tensor],
    *,
    batched: Sequence[bool] = (),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    compile_backend: str | None = "aot_eager",
) -> None:
    """All that every implementation must pass: budget, non-contiguous inputs, empty batch, full-graph compile.

    Args:
        run: The implementation, a function of ``tensors``.
        reference: The definition.
        tensors: One set of inputs.
        batched: Which of them have a batch axis, which is the first; all if empty.
        dtypes: Precisions to hold to the budget.
        compile_backend: Backend for ``torch.compile(fullgraph=True)``; None leaves it out.

    Raises:
        AssertionError: a check failed; the message says which.
    """
    for dtype in dtypes:
        assert_within_budget(run, reference, tensors, dtype=dtype)
    plain = run(*tensors)
    strided = [non_contiguous(x) if x.is_floating_point() and x.ndim else x for x in tensors]
    assert_within_budget(run, reference, strided)
    has_batch = batched or [True] * len(tensors)
    empty = [x[:0] if yes else x for x, yes in zip(tensors, has_batch, strict=True)]
    assert run(*empty).shape == (0, *plain.shape[1:]), "an empty batch must give an empty output"
    if compile_backend is not None:
        torch._dynamo.reset()
        compiled: Any = torch.compile(run, fullgraph=True, backend=compile_backend)
        torch.testing.assert_close(compiled(*tensors), plain, rtol=1e-5, atol=1e-6)
