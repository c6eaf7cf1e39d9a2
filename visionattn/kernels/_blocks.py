"""What kernels share: loading and storing blocks of rows, sizes of blocks, products."""

import math

import torch
import triton
import triton.language as tl

from visionattn.kernels._launch import Config

LOG2E = math.log2(math.e)  # exponentials are taken to base 2, as the hardware does


def attention_configs(dtype: torch.dtype, width: int, *, own: str, other: str) -> list[Config]:
    """Return configurations of a kernel that holds one block of tokens and walks over blocks of others.

    Args:
        dtype: Of the operands.
        width: Channels of the widest of them.
        own: Name of the constant for the tokens that a program holds.
        other: Name of the constant for those it walks over.
    """
    # The largest blocks that none of sm_80, sm_90, sm_100 and gfx942 spills registers at; fp32 holds three products.
    if dtype == torch.float32:
        sizes = {own: 32, other: 16} if width <= 32 else {own: 16, other: 32}
        return [Config(sizes, warps=4, stages=1)]
    if width > 64:
        return [Config({own: 32, other: 32}, warps=4), Config({own: 64, other: 32}, warps=8)]
    return [Config({own: 64, other: 64 if width <= 32 else 32}, warps=4), Config({own: 128, other: 64}, warps=8)]


def block(size: int, least: int = 16) -> int:
    """Return the power of two that holds ``size``; tensor cores need at least 16."""
    return max(least, triton.next_power_of_2(size))


def split(groups: int, tokens: int) -> tuple[int, int]:
    """Return how many programs share the tokens of each group, and how many tokens each of them takes.

    The numbers depend on the shape alone, so that sums over the parts repeat exactly. Enough programs to fill a GPU,
    and tokens enough for each that what it adds to the partial sums is little beside what it reads.
    """
    programs = min(max(groups * tokens // 1024, 256), 1024)
    parts = max(min(programs // max(groups, 1), triton.cdiv(tokens, 128)), 1)
    chunk = triton.cdiv(triton.cdiv(tokens, parts), 128) * 128
    return triton.cdiv(tokens, max(chunk, 1)), chunk


INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
# fp32 products: three passes of tensor cores on NVIDIA, whose error is fp32's; AMD's matrix units take fp32 as it is.
FP32 = tl.constexpr("ieee" if torch.version.hip else "tf32x3")


@triton.jit
def dot(a, b, acc=None):
    """``a @ b + acc``, accumulated in fp32; fp32 operands keep their precision."""
    if INTERPRETED:  # the interpreter cannot multiply bf16; in fp32 the products are the same
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=FP32)


@triton.jit
def load_rows(base, rows, stride, valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``(n,)`` of a matrix with ``D`` columns, zero where not ``valid``: ``(n, BLOCK_D)``."""
    cols = tl.arange(0, BLOCK_D)
    at = base + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if D == BLOCK_D:
        return tl.load(at, mask=valid[:, None], other=0.0)
    return tl.load(at, mask=valid[:, None] & (cols < D)[None, :], other=0.0)


@triton.jit
def dot_rows(a, a_at, a_valid, b, b_at, b_valid, D: tl.constexpr):
    """Products of rows of two matrices, ``(n, m)``, over 64 channels at a time, whose operands fit registers in fp32.

    Rows start ``a_at (n,)`` and ``b_at (m,)`` elements from the matrices, and are zero where not valid.
    """
    result = tl.zeros((a_at.shape[0], b_at.shape[0]), tl.float32)
    for start in range(0, D, 64):
        cols = start + tl.arange(0, 64)
        left = tl.load(a + a_at[:, None] + cols[None, :], mask=a_valid[:, None] & (cols < D)[None, :], other=0.0)
        right = tl.load(b + b_at[:, None] + cols[None, :], mask=b_valid[:, None] & (cols < D)[None, :], other=0.0)
        result = dot(left, tl.trans(right), result)
    return result


@triton.jit
def products(rows, others, a, a_at, a_valid, b, b_at, b_valid, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """``rows @ others.T``; wide fp32 rows are read again, with `dot_rows`, which the other arguments are for."""
    if rows.dtype == tl.float32 and BLOCK_D > 64:
        return dot_rows(a, a_at, a_valid, b, b_at, b_valid, D)
    return dot(rows, tl.trans(others))


@triton.jit
def store_rows(base, rows, stride, valid, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write ``x (n, BLOCK_D)`` to rows of a matrix with ``D`` columns, where ``valid``."""
    cols = tl.arange(0, BLOCK_D)
    at = base + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(at, x.to(base.dtype.element_ty), mask=valid[:, None] & (cols < D)[None, :])
