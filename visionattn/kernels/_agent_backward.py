"""The backward pass of agent attention: kernels of either of its softmaxes, launched by `agent_attention`.

``SPREAD`` says that tokens are the rows: queries, which share out what agents hold. Otherwise agents are: they gather
from keys. With weights P, the gradient of a logit is ``P * (x . y - sum(P * x . y))``, the sum over its row: ``x`` is
the token's, ``y`` the agent's part of the gradient of a weight. Sums are taken of the P that they are used with, not of
results: what cancels in exact arithmetic then does so here, and results need not be kept.
"""

import triton
import triton.language as tl

from visionattn.kernels._agent_bias import interpolate
from visionattn.kernels._blocks import dot, load_rows, products, store_rows
from visionattn.kernels._softmax import load_stats


@triton.jit
def _weights(own, other, own_x, other_y, bias, row_top, row_inverse, valid, scale2):
    """Weights and their gradients."""
    attn = _softmax(dot(own, tl.trans(other)), bias, row_top, row_inverse, valid, scale2)
    return attn, dot(own_x, tl.trans(other_y))


@triton.jit
def _softmax(match, bias, row_top, row_inverse, valid, scale2):
    """Weights from products."""
    return tl.where(valid, tl.exp2(match * scale2 + bias - row_top) * row_inverse, 0.0)


@triton.jit
def by_tokens(
    tokens, x, agents, y, tables, stats, sums, dtokens, dx,
    t_b, t_h, t_n, x_b, x_h, x_n, a_b, a_h, a_n, dt_b, dt_h, dt_n, dx_b, dx_h, dx_n,
    heads, N, a, scale, scale2, P, H, W, grid_w,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SPREAD: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """Write the gradient of tokens, and the sums of rows where those are tokens, the gradient of ``x`` where not."""
    blocks = tl.cdiv(N, BLOCK_N)
    group = (tl.program_id(0) // blocks).to(tl.int64)
    b, head = group // heads, group % heads
    agents += b * a_b + head * a_h
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    own = load_rows(tokens + b * t_b + head * t_h, n, t_n, n < N, D, BLOCK_D)
    own_x = load_rows(x + b * x_b + head * x_h, n, x_n, n < N, DV, BLOCK_DV)
    if SPREAD:
        own_top, own_inverse = load_stats(stats, group * N + n, n < N)
        own_sum = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, a, BLOCK_A):
            agent = start + tl.arange(0, BLOCK_A)
            other = load_rows(agents, agent, a_n, agent < a, D, BLOCK_D)
            other_y = load_rows(y, group * a + agent, DV, agent < a, DV, BLOCK_DV).to(own_x.dtype)
            valid = (n < N)[:, None] & (agent < a)[None, :]
            bias = 0.0
            if HAS_BIAS:
                bias = interpolate(tables, n[:, None], agent[None, :], valid, head, a, P, H, W, grid_w)
            attn, dattn = _weights(
                own, other, own_x, other_y, bias, own_top[:, None], own_inverse[:, None], valid, scale2
            )
            own_sum += tl.sum(attn * dattn, 1)
        tl.store(sums + group * N + n, own_sum, mask=n < N)

    down = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    down_x = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for start in range(0, a, BLOCK_A):
        agent = start + tl.arange(0, BLOCK_A)
        other = load_rows(agents, agent, a_n, agent < a, D, BLOCK_D)
        other_y = load_rows(y, group * a + agent, DV, agent < a, DV, BLOCK_DV).to(own_x.dtype)
        valid = (n < N)[:, None] & (agent < a)[None, :]
        bias = 0.0
        if HAS_BIAS:
            bias = interpolate(tables, n[:, None], agent[None, :], valid, head, a, P, H, W, grid_w)
        if SPREAD:
            row_top, row_inverse, row_sum = own_top[:, None], own_inverse[:, None], own_sum[:, None]
        else:
            row_top, row_inverse = load_stats(stats, group * a + agent[None, :], agent[None, :] < a)
            row_sum = tl.load(sums + group * a + agent, mask=agent < a, other=0.0)[None, :]
        attn, dattn = _weights(own, other, own_x, other_y, bias, row_top, row_inverse, valid, scale2)
        down = dot((attn * (dattn - row_sum)).to(other.dtype), other, down)
        if not SPREAD:
            down_x = dot(attn.to(other_y.dtype), other_y, down_x)
    store_rows(dtokens + b * dt_b + head * dt_h, n, dt_n, n < N, down * scale, D, BLOCK_D)
    if not SPREAD:
        store_rows(dx + b * dx_b + head * dx_h, n, dx_n, n < N, down_x, DV, BLOCK_DV)


@triton.jit
def by_agents(
    tokens, x, agents, y, tables, stats, sums, dagents, dy,
    t_b, t_h, t_n, x_b, x_h, x_n, a_b, a_h, a_n,
    B, heads, N, a, run, runs, scale, scale2, P, H, W, grid_w,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SPREAD: tl.constexpr, SUMS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write a run of tokens' part of the gradients of agents and ``y``; with ``SUMS`` of the sums of rows, agents."""
    blocks = tl.cdiv(a, BLOCK_A)
    part = tl.program_id(0) // runs
    group = (part // blocks).to(tl.int64)
    b, head = group // heads, group % heads
    tokens += b * t_b + head * t_h
    x += b * x_b + head * x_h
    agent = part % blocks * BLOCK_A + tl.arange(0, BLOCK_A)
    own = load_rows(agents + b * a_b + head * a_h, agent, a_n, agent < a, D, BLOCK_D)
    own_y = load_rows(y, group * a + agent, DV, agent < a, DV, BLOCK_DV).to(own.dtype)
    if not SPREAD:
        own_top, own_inverse = load_stats(stats, group * a + agent, agent < a)
        if not SUMS:
            own_sum = tl.load(sums + group * a + agent, mask=agent < a, other=0.0)

    total = tl.zeros((BLOCK_A,), tl.float32)
    down = tl.zeros((BLOCK_A, BLOCK_D), tl.float32)
    down_y = tl.zeros((BLOCK_A, BLOCK_DV), tl.float32)
    number = tl.program_id(0) % runs
    last = tl.minimum(N, (number + 1) * run)
    for start in range(number * run, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        other = load_rows(tokens, n, t_n, n < last, D, BLOCK_D)
        other_x = load_rows(x, n, x_n, n < last, DV, BLOCK_DV)
        valid = (agent < a)[:, None] & (n < last)[None, :]
        bias = 0.0
        if HAS_BIAS:
            bias = interpolate(tables, n[None, :], agent[:, None], valid, head, a, P, H, W, grid_w)
        if SPREAD:
            row_top, row_inverse = load_stats(stats, group * N + n[None, :], n[None, :] < last)
            row_sum = tl.load(sums + group * N + n, mask=n < last, other=0.0)[None, :]
        elif SUMS:
            row_top, row_inverse = own_top[:, None], own_inverse[:, None]
        else:
            row_top, row_inverse, row_sum = own_top[:, None], own_inverse[:, None], own_sum[:, None]
        attn, dattn = _weights(own, other, own_y, other_x, bias, row_top, row_inverse, valid, scale2)
        if SUMS:
            total += tl.sum(attn * dattn, 1)
        else:
            down = dot((attn * (dattn - row_sum)).to(other.dtype), other, down)
        if SPREAD:
            down_y = dot(attn.to(other_x.dtype), other_x, down_y)
    out = (number * B * heads + group) * a + agent
    if SUMS:
        tl.store(dagents + out, total, mask=agent < a)
    else:
        store_rows(dagents, out, D, agent < a, down * scale, D, BLOCK_D)
    if SPREAD:
        store_rows(dy, out, DV, agent < a, down_y, DV, BLOCK_DV)


@triton.jit
def by_bias(
    tokens, x, agents, y, tables, stats, sums, dbias,
    t_b, t_h, t_n, x_b, x_h, x_n, a_b, a_h, a_n,
    B, heads, N, a, runs, scale2, P, H, W, grid_w,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SPREAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a written-out bias, summed over a part of the batch."""
    blocks, parts = tl.cdiv(N, BLOCK_N), tl.cdiv(a, BLOCK_A)
    head = (tl.program_id(0) // parts // blocks % heads).to(tl.int64)
    number = tl.program_id(0) // parts // blocks // heads
    n = tl.program_id(0) // parts % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    agent = tl.program_id(0) % parts * BLOCK_A + tl.arange(0, BLOCK_A)
    valid = (n < N)[:, None] & (agent < a)[None, :]
    bias = interpolate(tables, n[:, None], agent[None, :], valid, head, a, P, H, W, grid_w)

    total = tl.zeros((BLOCK_N, BLOCK_A), tl.float32)
    for item in range(number, B, runs):
        b = tl.full((), item, tl.int64)
        group = b * heads + head
        t_at, x_at, a_at = tokens + b * t_b + head * t_h, x + b * x_b + head * x_h, agents + b * a_b + head * a_h
        own = load_rows(t_at, n, t_n, n < N, D, BLOCK_D)
        other = load_rows(a_at, agent, a_n, agent < a, D, BLOCK_D)
        own_x = load_rows(x_at, n, x_n, n < N, DV, BLOCK_DV)
        other_y = load_rows(y, group * a + agent, DV, agent < a, DV, BLOCK_DV).to(own_x.dtype)
        if SPREAD:
            row_top, row_inverse = load_stats(stats, group * N + n[:, None], (n < N)[:, None])
            row_sum = tl.load(sums + group * N + n, mask=n < N, other=0.0)[:, None]
        else:
            row_top, row_inverse = load_stats(stats, group * a + agent[None, :], agent[None, :] < a)
            row_sum = tl.load(sums + group * a + agent, mask=agent < a, other=0.0)[None, :]
        n_at, agent_at, y_at = n.to(tl.int64), agent.to(tl.int64), (group * a + agent) * DV
        match = products(own, other, t_at, n_at * t_n, n < N, a_at, agent_at * a_n, agent < a, D, BLOCK_D)
        attn = _softmax(match, bias, row_top, row_inverse, valid, scale2)
        dattn = products(own_x, other_y, x_at, n_at * x_n, n < N, y, y_at, agent < a, DV, BLOCK_DV)
        total += attn * (dattn - row_sum)
    dbias += ((number * heads + head) * N + n)[:, None] * a + agent[None, :]
    tl.store(dbias, total, mask=valid)
