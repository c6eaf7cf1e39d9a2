"""How an implementation that compilers must not look into becomes one differentiable function.

Forward and backward pass are registered as two opaque operators of ``torch.ops.visionattn``, neither with a gradient of
its own, below one `torch.autograd.Function`: an arrangement that ``torch.compile``, ``torch.export``, ``torch.func``,
activation checkpointing and DDP take alike.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from visionattn.ops import _dispatch
from visionattn.ops._autocast import autocast_dtype


def differentiable(
    name: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    fake_backward: Callable[..., Any] | None = None,
    save: Sequence[int] = (),
) -> Callable[..., Any]:
    """Register ``visionattn::<name>`` and ``visionattn::<name>_backward``; return the function of both.

    Args:
        name: Name of the operator.
        forward: Of tensors, optional tensors, numbers, strings and lists of ints, annotated so; it returns a tensor, or
            a tuple of which the first is the result and the others are kept for the backward pass alone.
        fake: As ``forward``, on tensors without data: allocates what it returns.
        backward: ``backward(dout, *inputs, *saved)``, with the parameters of ``forward`` in their order. Returns a
            gradient for each parameter that is a tensor, optional or not; an empty tensor where there is none.
        fake_backward: As ``backward``, on tensors without data. By default, fresh contiguous tensors like the inputs.
        save: Which results of ``forward`` the backward pass gets, by position.
    """
    parameters = list(inspect.signature(forward).parameters.values())
    tensors = [i for i, p in enumerate(parameters) if p.annotation in (Tensor, Tensor | None)]
    forward_op = _operator(name, forward, fake)

    def like_inputs(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
        return tuple(_gradient_like(dout, args[i]) for i in tensors)

    backward_op = _operator(f"{name}_backward", backward, fake_backward or like_inputs)

    class Differentiable(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return forward_op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            if len(outputs) > 1:  # Dynamo takes a call without arguments for one about a tuple
                ctx.mark_non_differentiable(*outputs[1:])
            ctx.save_for_backward(*(inputs[i] for i in tensors), *(outputs[i] for i in save))
            ctx.options = [None if i in tensors else x for i, x in enumerate(inputs)]

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, dout: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
            args, saved = list(ctx.options), ctx.saved_tensors
            for i, x in zip(tensors, saved, strict=False):
                args[i] = x
            grads = backward_op(dout, *args, *saved[len(tensors) :])
            result: list[Tensor | None] = [None] * len(args)
            for i, grad in zip(tensors, (grads,) if isinstance(grads, Tensor) else grads, strict=True):
                if ctx.needs_input_grad[i]:
                    result[i] = grad
            return tuple(result)

    def run(*args: Any) -> Any:
        tracked = torch.is_grad_enabled() and any(args[i] is not None and args[i].requires_grad for i in tensors)
        out = Differentiable.apply(*args) if tracked else forward_op(*args)
        return out[0] if isinstance(out, tuple) else out

    return run


def _gradient_like(dout: Tensor, x: Tensor | None) -> Tensor:
    if x is None:
        return dout.new_empty(0)
    return x.new_empty(x.shape if x.is_floating_point() else 0)


def _operator(name: str, compute: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an opaque operator, its shapes, and a rule for vmap that runs it once for each item."""
    qualified = f"visionattn::{name}"
    torch.library.define(qualified, torch.library.infer_schema(compute, mutates_args=()))
    torch.library.impl(qualified, "default", compute)
    torch.library.register_fake(qualified, fake)
    op = getattr(torch.ops.visionattn, name)

    def vmap(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        items = [
            op(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(items[0], Tensor):
            return torch.stack(items), 0
        return tuple(torch.stack(x) for x in zip(*items, strict=True)), (0,) * len(items[0])

    torch.library.register_vmap(qualified, vmap)
    return op


def why_not_triton(*tensors: Tensor | None, widest: int = 256) -> str | None:
    """Return why Triton's kernels cannot take tensors ``(..., d)``, or None.

    Args:
        *tensors: Queries, keys, values.
        widest: Largest ``d`` that the kernels hold at once.
    """
    for x in tensors:
        if x is None:
            continue
        if x.device.type != "cuda" and not _dispatch.INTERPRET:
            return f"Triton's kernels need CUDA tensors, these are on {x.device}"
        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"Triton's kernels take fp16, bf16 and fp32, not {x.dtype}"
        if x.shape[-1] > widest:
            return f"Triton's kernel takes up to {widest} channels a head, got {x.shape[-1]}"
    return "exporters cannot look into kernels" if _dispatch.exporting() else None


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast casts the operands of PyTorch's fused attention, where it is on."""
    dtype = autocast_dtype(tensors[0])
    return tensors if dtype is None else tuple(x.to(dtype) if x.dtype == torch.float32 else x for x in tensors)
