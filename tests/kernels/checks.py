"""What every Triton kernel must pass besides its own tests."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from visionattn.testing import assert_within_budget, check_operator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # there, the interpreter (see tests/conftest.py)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW = 16  # numbers, fewer of which may round well in the reference and badly in the kernel by luck alone
FAR = 2**30  # elements from one token to the next: three tokens do not fit 32-bit offsets

Run = Callable[..., Tensor]


def check_kernel(run: Run, reference: Run, tensors: Sequence[Tensor], *, batched: Sequence[bool] = ()) -> None:
    """Budgets in three dtypes, strided and empty inputs, one graph: as `visionattn.testing.check_operator`."""
    check_operator(run, reference, [x.to(DEVICE) for x in tensors], batched=batched, dtypes=DTYPES)


def check_budget(run: Run, reference: Run, tensors: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Output and gradients within the error budget, on the device of the tests."""
    assert_within_budget(run, reference, [x.to(DEVICE) for x in tensors], dtype=dtype)


def copies(numbers: int) -> int:
    """How many heads or items make ``numbers``, the fewest that a gradient has in each of them, no longer few."""
    return -(-FEW // numbers)


def check_transforms(run: Run, tensors: Sequence[Tensor]) -> None:
    """Gradients through `torch.func`, checkpointing and a compiled step equal autograd's, which repeat exactly."""
    leaves = [x.to(DEVICE).requires_grad_() if x.is_floating_point() else x.to(DEVICE) for x in tensors]
    which = tuple(i for i, x in enumerate(leaves) if x.requires_grad)

    def loss(*x: Tensor) -> Tensor:
        return run(*x).square().sum()

    expected = torch.autograd.grad(loss(*leaves), [leaves[i] for i in which])
    again = torch.autograd.grad(loss(*leaves), [leaves[i] for i in which])
    for a, b in zip(again, expected, strict=True):
        assert torch.equal(a, b), "two runs must agree to the last bit"
    detached = [x.detach() for x in leaves]
    by_func = torch.func.grad(loss, argnums=which)(*detached)
    recomputed = torch.autograd.grad(checkpoint(loss, *leaves, use_reentrant=False), [leaves[i] for i in which])
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    by_compiler = torch.autograd.grad(compiled(*leaves), [leaves[i] for i in which])
    for name, grads in (("torch.func.grad", by_func), ("checkpoint", recomputed), ("torch.compile", by_compiler)):
        for a, b in zip(grads, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def far_apart(x: Tensor, dim: int) -> Tensor:
    """The same values with `FAR` elements between the entries of ``dim``; memory between them is never touched."""
    x = x.movedim(dim, 0).contiguous()
    out = x.new_empty((x.shape[0] - 1) * FAR + x[0].numel()).as_strided(x.shape, (FAR, *x.stride()[1:]))
    return out.copy_(x).movedim(0, dim)
