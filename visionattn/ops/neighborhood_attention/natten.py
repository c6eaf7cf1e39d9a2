"""NATTEN's own CUDA kernels (natten >= 0.20), which have no relative position bias."""

import torch
from torch import Tensor

from visionattn.ops.neighborhood_attention._windows import Pair


def why_not(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel_size: Pair, dilation: Pair, scale: float
) -> str | None:
    """No bias, half or single precision, a head width that the kernels are built for, on a GPU."""
    if bias is not None:
        return "NATTEN has no relative position bias since 0.20"
    if q.device.type != "cuda":
        return f"NATTEN's kernels need CUDA tensors, these are on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"NATTEN's kernels take fp16, bf16 and fp32, not {q.dtype}"
    d, dv = q.shape[-1], v.shape[-1]
    if d % 8 or d != dv:
        return (
            f"NATTEN's kernels need a head width that is a multiple of 8, the same for keys and values, got {d}, {dv}"
        )
    if q.numel() == 0:
        return "an empty input is left to plain PyTorch"
    import natten

    if not natten.HAS_LIBNATTEN:
        return "natten is installed without its CUDA library (libnatten)"
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel_size: Pair, dilation: Pair, scale: float
) -> Tensor:
    """Call ``natten.na2d``, whose maps are ``(B, H, W, heads, d)``."""
    from natten import na2d

    q, k, v = (x.permute(0, 2, 3, 1, 4).contiguous() for x in (q, k, v))
    out: Tensor = na2d(q, k, v, kernel_size=kernel_size, dilation=dilation, scale=scale)
    return out.permute(0, 3, 1, 2, 4)
