"""Fast plain PyTorch: exact, in tiles of queries that see all keys; the backward pass computes the tiles again.

Few scores are computed at once; where gradients are asked for also more, which are then kept instead.

Clipping is one soft shrinkage: ``clip((zeta - gamma) p + gamma, 0, 1) = (zeta - gamma) min(relu(p - low), width)`` with
``low = -gamma / (zeta - gamma)`` and ``width = 1 / (zeta - gamma)``, and the factor moves to the output.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from visionattn.ops._crossovers import first_wins
from visionattn.ops._dispatch import exporting
from visionattn.ops._register import differentiable
from visionattn.ops._tiles import joined, shares, tiles

WHOLE_WINS = "clipped_softmax_attention: scores; whole, tiles"
KEPT_WINS = "clipped_softmax_attention: scores, with gradients; whole and kept, tiles computed again"


def why_not(q: Tensor, k: Tensor, v: Tensor, gamma: float, zeta: float, scale: float) -> str | None:
    """Everything runs, but the tile loop cannot be exported."""
    return "its tile loop is opaque to exporters" if exporting() else None


def forward(q: Tensor, k: Tensor, v: Tensor, gamma: float, zeta: float, scale: float) -> Tensor:
    """Attend at once or in tiles; without clipping, leave it to PyTorch."""
    if gamma == 0 and zeta == 1:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    whole = first_wins(KEPT_WINS if differentiated else WHOLE_WINS, scores, q)
    return (_whole if whole else _tiled)(q, k, v, gamma, zeta, scale)


def _whole(q: Tensor, k: Tensor, v: Tensor, gamma: float, zeta: float, scale: float) -> Tensor:
    exact = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = _groups(q, exact), _groups(k, exact), _groups(v, exact)
    logits = torch.baddbmm(queries.new_zeros(1, 1, 1), queries, keys.transpose(1, 2), beta=0, alpha=scale)
    attn, low = logits.softmax(dim=-1, dtype=exact), -gamma / (zeta - gamma)
    attn = F.hardtanh(attn, low, (1 - gamma) / (zeta - gamma)).sub_(low) if zeta > 1 else F.softshrink(attn, low)
    out = torch.bmm(attn, values).mul_(zeta - gamma)
    return out.view(*q.shape[:-1], v.shape[-1]).to(v.dtype)


def _forward(q: Tensor, k: Tensor, v: Tensor, gamma: float, zeta: float, scale: float) -> Tensor:
    B, h, N, _ = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = _groups(q, exact), _groups(k, exact), _groups(v, exact)
    out = queries.new_empty(B * h, N, v.shape[-1])
    buffers = _buffers(queries, keys, 2)
    for group, rows in tiles(B * h, N, k.shape[2], queries.element_size()):
        part = shares(queries[group, rows])
        logits, attn = _views(buffers, part, keys)
        _softmax(part, keys[group], scale, logits, attn)
        _clip(attn, gamma, zeta, out=logits)
        torch.bmm(logits, values[group].expand(len(part), -1, -1), out=shares(out[group, rows]))
    out *= zeta - gamma
    return out.view(B, h, N, v.shape[-1]).to(v.dtype)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, gamma: float, zeta: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, h, N, _ = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = _groups(q, exact), _groups(k, exact), _groups(v, exact)
    grads = _groups(dout, exact) * (zeta - gamma)
    dq = torch.empty_like(queries)
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    buffers = _buffers(queries, keys, 3)
    low, high = -gamma / (zeta - gamma), (1 - gamma) / (zeta - gamma)
    for group, rows in tiles(B * h, N, k.shape[2], queries.element_size()):
        part, grad = shares(queries[group, rows]), shares(grads[group, rows])
        attn, clipped, dattn = _views(buffers, part, keys)
        _softmax(part, keys[group], scale, clipped, attn)
        _clip(attn, gamma, zeta, out=clipped)
        dv[group].baddbmm_(joined(clipped, group).transpose(1, 2), grads[group, rows])
        torch.bmm(grad, values[group].transpose(1, 2).expand(len(part), -1, -1), out=dattn)
        if zeta > 1:
            torch.ops.aten.hardtanh_backward.grad_input(dattn, attn, low, high, grad_input=clipped)
        else:
            torch.ops.aten.softshrink_backward.grad_input(dattn, attn, low, grad_input=clipped)
        torch.ops.aten._softmax_backward_data.out(clipped, attn, -1, exact, grad_input=dattn)
        torch.bmm(dattn, keys[group].expand(len(part), -1, -1), out=shares(dq[group, rows]))
        dk[group].baddbmm_(joined(dattn, group).transpose(1, 2), queries[group, rows], alpha=scale)
    dq *= scale
    return dq.view(q.shape).to(q.dtype), dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype)


def _groups(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``(B, h, N, d)`` to contiguous ``(B * h, N, d)``."""
    return x.to(dtype).contiguous().flatten(0, 1)


def _buffers(queries: Tensor, keys: Tensor, count: int) -> Tensor:
    """Memory for the largest tile of scores, taken once: ``(count, elements)``."""
    groups, N, _ = queries.shape
    first = next(tiles(groups, N, keys.shape[1], queries.element_size()), (slice(0, 0), slice(0, 0)))
    return queries.new_empty(count, first[0].stop * first[1].stop * keys.shape[1])


def _views(buffers: Tensor, queries: Tensor, keys: Tensor) -> list[Tensor]:
    """The buffers, cut to a tile's ``(groups, queries, keys)``."""
    shape = (*queries.shape[:2], keys.shape[1])
    return [b[: shape[0] * shape[1] * shape[2]].view(shape) for b in buffers]


def _softmax(queries: Tensor, keys: Tensor, scale: float, logits: Tensor, out: Tensor) -> None:
    torch.baddbmm(logits, queries, keys.transpose(1, 2).expand(len(queries), -1, -1), beta=0, alpha=scale, out=logits)
    torch.ops.aten._softmax.out(logits, -1, False, out=out)


def _clip(attn: Tensor, gamma: float, zeta: float, out: Tensor) -> None:
    """Clipped probabilities over ``zeta - gamma``."""
    torch.ops.aten.softshrink.out(attn, -gamma / (zeta - gamma), out=out)
    if zeta > 1:
        out.clamp_(max=1 / (zeta - gamma))


def _fake(q: Tensor, k: Tensor, v: Tensor, gamma: float, zeta: float, scale: float) -> Tensor:
    return v.new_empty(*q.shape[:-1], v.shape[-1])


# The tile loop is opaque to compilers: its trip count depends on the shape and must not be unrolled.
_tiled = differentiable("clipped_softmax_attention_tiled", _forward, _fake, _backward)
