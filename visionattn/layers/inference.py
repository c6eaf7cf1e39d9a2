"""What inference on the CPU may do that training may not: overwrite, and run residual branches part by part."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

MAPPED_BYTES = 2**25  # glibc maps larger tensors anew each time, and every page of them faults
PART_BYTES = 2**20 * 3 // 2  # of a part's tokens: with four times as many hidden channels it stays in the cache


def overwritable(x: Tensor, *modules: nn.Module) -> bool:
    """Whether nobody sees it if what ``modules`` take and return, such as ``x``, is overwritten afterwards.

    True of eager inference on the CPU, in one precision and without forward hooks on ``modules``.
    """
    return (
        x.device.type == "cpu"
        and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and not any(m.training or m._forward_hooks or m._forward_pre_hooks for m in modules)
    )


def add_in_place(x: Tensor, branch: Callable[[Tensor], Tensor], width: int) -> Tensor:
    """Return ``x + branch(x)`` in the memory of ``x``, for some items of the first axis at a time if they are large.

    Args:
        x: ``(items, ..., C)``.
        branch: Maps items to items of the same shape, each by itself.
        width: Times as many channels as ``x`` has that the branch holds.
    """
    size = x.numel() * x.element_size()
    step = len(x) if width * size <= MAPPED_BYTES else max(1, len(x) * PART_BYTES // size)
    for part in x.split(step):
        part += branch(part)
    return x
