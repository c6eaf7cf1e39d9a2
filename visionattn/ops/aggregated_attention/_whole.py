"""For few pooled tokens: all weights at once, which the backward pass finds again.

Weights are planes as well, ``(B, heads, cells + P, N)``, the window first: one softmax over planes, nothing to join.
"""

import torch
from torch import Tensor

from visionattn.ops._autocast import exact_bmm
from visionattn.ops._register import differentiable
from visionattn.ops.aggregated_attention._window import Window, fake_gradients, planes_like


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the result, and the softmax."""
    window = Window(q, bias_local.shape[1])
    queries = window.plane(q)
    k_pool, v_pool = (x.to(window.dtype).flatten(0, 1) for x in (k_pool, v_pool))
    attn = queries.new_empty(*queries.shape[:2], window.cells + k_pool.shape[1], window.N)
    local, pooled = attn.tensor_split((window.cells,), dim=2)
    window.logits(queries, window.padded(k), bias_local, out=local)
    logits = exact_bmm(k_pool, queries.flatten(0, 1)).view(pooled.shape)
    torch.add(logits, bias_pool.transpose(1, 2), out=pooled)
    torch.softmax(attn, dim=2, out=attn)
    out = exact_bmm(v_pool.transpose(1, 2), pooled.flatten(0, 1)).unflatten(0, (window.B, window.h))
    window.gather(out, window.weights(local, extra), window.padded(v))
    return window.map(out).to(v.dtype), attn


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
    attn: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    window = Window(q, bias_local.shape[1])
    by_head = (window.B, window.h)
    queries, keys, values, grads = window.plane(q), window.padded(k), window.padded(v), window.plane(dout)
    keys_pool, values_pool = (x.to(window.dtype).flatten(0, 1) for x in (k_pool, v_pool))
    local, pooled = attn.tensor_split((window.cells,), dim=2)
    dlogits = torch.empty_like(attn)
    dlocal, dpooled = dlogits.tensor_split((window.cells,), dim=2)
    window.products(grads, values, dlocal)
    dextra = dout.new_empty(0)
    if extra is not None:
        window.fill_beside(dlocal, 0.0)
        dextra = window.map(dlocal.clone(memory_format=torch.contiguous_format)).to(extra.dtype)
    dpooled.copy_(exact_bmm(values_pool, grads.flatten(0, 1)).view(dpooled.shape))
    torch.ops.aten._softmax_backward_data.out(dlogits, attn, 2, attn.dtype, grad_input=dlogits)
    pooled, dpooled = pooled.flatten(0, 1), dpooled.flatten(0, 1)  # (G, P, N)
    dk_pool = exact_bmm(dpooled, queries.flatten(0, 1).transpose(1, 2)).view(k_pool.shape)
    dv_pool = exact_bmm(pooled, grads.flatten(0, 1).transpose(1, 2)).view(v_pool.shape)
    dbias_pool = dpooled if window.B == 1 else dpooled.unflatten(0, by_head).sum(dim=0)
    dq = exact_bmm(keys_pool.transpose(1, 2), dpooled).unflatten(0, by_head)
    dq, dk, dv = window.gradients(queries, keys, grads, dq, dlocal, window.weights(local, extra))
    return (
        dq.to(q.dtype),
        dk.to(k.dtype),
        dv.to(v.dtype),
        dk_pool.to(k.dtype),
        dv_pool.to(v.dtype),
        dlocal.sum(dim=(0, 3)).to(bias_local.dtype),
        dbias_pool.transpose(1, 2).contiguous().to(bias_pool.dtype),
        dextra,
    )


def _fake(
    q: Tensor, k: Tensor, v: Tensor, k_pool: Tensor, v_pool: Tensor, bias_local: Tensor, *_: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, h, H, W = q.shape[:4]
    exact = torch.promote_types(q.dtype, torch.float32)
    columns = bias_local.shape[1] + k_pool.shape[2]
    return planes_like(v), q.new_empty(B, h, columns, H * W, dtype=exact)


# Opaque to compilers, which take overlapping views for what they are not.
whole = differentiable("aggregated_attention_whole", _forward, _fake, _backward, fake_backward=fake_gradients, save=[1])
