"""Checks of arguments that operators share."""

from torch import Tensor


def check_maps(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all are ``(B, heads, H, W, d)`` maps that differ in ``d`` of ``v`` at most."""
    _check(op, 5, "(B, heads, H, W, head_dim)", tensors)


def check_tokens(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all are ``(B, heads, N, d)``; N of ``k`` and ``v`` may differ from that of ``q``."""
    _check(op, 4, "(B, heads, tokens, head_dim)", tensors)


def _check(op: str, ndim: int, form: str, tensors: dict[str, Tensor]) -> None:
    (first, like), *others = tensors.items()
    shape, dtype, device = like.shape, like.dtype, like.device
    # What is usual is seen at once: on the CPU, small calls take little longer than the checks of each tensor.
    if len(shape) == ndim and like.is_floating_point():
        for _, x in others:
            if x.shape != shape or x.dtype != dtype or x.device != device:
                break
        else:
            return
    for name, x in tensors.items():
        if x.ndim != ndim:
            raise ValueError(f"{op}: {name} must be {form}, got shape {tuple(x.shape)}")
        if (x.dtype, x.device) != (dtype, device):
            raise ValueError(
                f"{op}: {name} is {x.dtype} on {x.device}, {first} is {dtype} on {device}; they must agree"
            )
        shared = x.shape[:-1] if ndim == 5 else x.shape[:2]
        if shared != shape[: len(shared)] or (name == "k" and x.shape[-1] != shape[-1]):
            raise ValueError(f"{op}: {name} {tuple(x.shape)} does not fit {first} {tuple(shape)}; {form} expected")
        if not x.is_floating_point():
            raise ValueError(f"{op}: {name} must be floating point, got {x.dtype}")
    if "k" in tensors and "v" in tensors and tensors["k"].shape[:-1] != tensors["v"].shape[:-1]:
        k, v = tensors["k"], tensors["v"]
        raise ValueError(f"{op}: k {tuple(k.shape)} and v {tuple(v.shape)} must have the same tokens")
