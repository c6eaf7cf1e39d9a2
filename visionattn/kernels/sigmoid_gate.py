"""Output gates: each pass reads and writes every row of channels once.

The backward pass recomputes the gates and writes both gradients together; a logit that gates a whole row gets its sum
over channels in the same program. Logits that gate several rows get the sum of those rows' gradients.

Letters: B batch, N tokens, h heads, d channels; a row is a head of a token.
"""

import triton
import triton.language as tl
from torch import Tensor, float32

from visionattn.kernels._blocks import block, load_rows, store_rows
from visionattn.kernels._launch import Config, launch
from visionattn.kernels._layout import rows

ELEMENTS = 4096  # of a program


def forward(y: Tensor, logits: Tensor, scale: float) -> Tensor:
    """Gate: contiguous ``(B, N, h, d)``."""
    y, logits = rows(y), rows(logits)
    B, N, h, d = y.shape
    out = y.new_empty(y.shape)
    launch(
        _forward,
        lambda b: triton.cdiv(B * N * h, b["BLOCK_R"]) if d else 0,
        *(y, logits, out, *y.stride()[:3], *_strides(y, logits), B * N * h, N, h, scale),
        configs=_configs(d),
        **_widths(y, logits),
    )
    return out


def backward(dout: Tensor, y: Tensor, logits: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of y and of the logits."""
    dout, y, logits = rows(dout), rows(y), rows(logits)
    B, N, h, d = y.shape
    dy, shape = y.new_empty(y.shape), (B, N, h, logits.shape[3])
    dlogits = logits.new_empty(shape, dtype=logits.dtype if logits.shape == shape else float32)
    launch(
        _backward,
        lambda b: triton.cdiv(B * N * h, b["BLOCK_R"]) if d else 0,
        *(dout, y, logits, dy, dlogits, *dout.stride()[:3], *y.stride()[:3], *_strides(y, logits)),
        *(B * N * h, N, h, scale),
        configs=_configs(d),
        **_widths(y, logits),
    )
    return dy, dlogits.sum_to_size(logits.shape).to(logits.dtype)


def _strides(y: Tensor, logits: Tensor) -> tuple[int, ...]:
    return logits.expand(*y.shape[:3], -1).stride()[:3]


def _configs(d: int) -> list[Config]:
    return [Config({"BLOCK_R": max(1, ELEMENTS // block(d, 1))}, stages=1)]


def _widths(y: Tensor, logits: Tensor) -> dict[str, int]:
    d = y.shape[3]
    return {"D": d, "BLOCK_D": block(d, 1), "PER_CHANNEL": logits.shape[3] > 1}


@triton.jit
def _at(r, N, heads, s_b, s_n, s_h):
    """Where rows, counted over the batch, start in memory."""
    token = r // heads
    b, n, head = (token // N).to(tl.int64), (token % N).to(tl.int64), (r % heads).to(tl.int64)
    return b * s_b + n * s_n + head * s_h


@triton.jit
def _gates(logits, at, valid, D: tl.constexpr, BLOCK_D: tl.constexpr, PER_CHANNEL: tl.constexpr):
    """Sigmoids of the logits of rows, ``(n, BLOCK_D)`` or ``(n, 1)``."""
    if PER_CHANNEL:
        x = load_rows(logits, at, 1, valid, D, BLOCK_D)
    else:
        x = tl.load(logits + at, mask=valid, other=0.0)[:, None]
    return tl.sigmoid(x.to(tl.float32))


@triton.jit
def _forward(
    y, logits, out,
    y_b, y_n, y_h, l_b, l_n, l_h,
    count, N, heads, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PER_CHANNEL: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = r < count
    x = load_rows(y, _at(r, N, heads, y_b, y_n, y_h), 1, valid, D, BLOCK_D)
    gate = _gates(logits, _at(r, N, heads, l_b, l_n, l_h), valid, D, BLOCK_D, PER_CHANNEL)
    store_rows(out, r, D, valid, x.to(tl.float32) * (gate * scale), D, BLOCK_D)


@triton.jit
def _backward(
    dout, y, logits, dy, dlogits,
    do_b, do_n, do_h, y_b, y_n, y_h, l_b, l_n, l_h,
    count, N, heads, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PER_CHANNEL: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = r < count
    grads = load_rows(dout, _at(r, N, heads, do_b, do_n, do_h), 1, valid, D, BLOCK_D).to(tl.float32)
    x = load_rows(y, _at(r, N, heads, y_b, y_n, y_h), 1, valid, D, BLOCK_D).to(tl.float32)
    gate = _gates(logits, _at(r, N, heads, l_b, l_n, l_h), valid, D, BLOCK_D, PER_CHANNEL)
    store_rows(dy, r, D, valid, grads * (gate * scale), D, BLOCK_D)
    steep = gate * (1 - gate) * scale
    if PER_CHANNEL:
        store_rows(dlogits, r, D, valid, grads * x * steep, D, BLOCK_D)
    else:
        change = tl.sum(grads * x, 1)[:, None] * steep  # (n, 1)
        store_rows(dlogits, r, 1, valid, change, 1, 1)
