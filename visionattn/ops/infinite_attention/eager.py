"""Fast plain PyTorch.

Pure form: the normaliser is one number a head, so the squared norm and the weighted sum accumulate together, tile by
tile, and the division comes last. The backward pass computes the tiles again instead of keeping them: only q, k, v,
the output and the norms are saved. Where all scores are fewer than a tile, they are computed at once.

Linear form: all weights are rows, one number a token, and are saved; each gradient is written in a pass or two.
"""

import torch
from torch import Tensor

from visionattn.ops._crossovers import first_wins
from visionattn.ops._dispatch import exporting
from visionattn.ops._register import differentiable
from visionattn.ops._tiles import joined, shares, tiles

WHOLE_WINS = "infinite_attention: scores; whole, tiles"


def why_not(q: Tensor, k: Tensor, v: Tensor, rho: Tensor, form: str, scale: float, eps: float) -> str | None:
    """Everything runs, but exporters cannot look into it."""
    return "its operators are opaque to exporters" if exporting() else None


def forward(q: Tensor, k: Tensor, v: Tensor, rho: Tensor, form: str, scale: float, eps: float) -> Tensor:
    """Accumulate over tiles, or score by the mean query."""
    if form == "linear":
        out = _pooled(q, k, v, scale, eps)
    else:
        whole = first_wins(WHOLE_WINS, q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2], q)
        out = (_whole if whole else _tiled)(q, k, v, scale, eps)
    return rho.to(v.dtype).reshape(-1, 1, 1) * out


def _whole(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float) -> Tensor:
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = ((q.to(exact) * scale) @ k.to(exact).transpose(-2, -1)).relu_()
    # In two steps, which is more exact; under autocast the scores are in half precision.
    rows = torch.linalg.vector_norm(scores, dim=-1, keepdim=True, dtype=exact)
    norm = torch.linalg.vector_norm(rows, dim=-2, keepdim=True)
    return ((scores @ v.to(exact)) / (norm + eps)).to(v.dtype)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor]:
    """Return ``relu(scale q k^T) v`` over its norm plus ``eps`` ``(B, h, N, dv)``, and the norm ``(B, h)`` in fp32."""
    B, h, N, _ = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = _groups(q, exact), _groups(k, exact), _groups(v, exact)
    out = queries.new_empty(B * h, N, v.shape[-1])
    squares = queries.new_zeros(B * h)
    scores_buffer = _buffer(queries, keys)
    for group, rows in tiles(B * h, N, k.shape[2], queries.element_size()):
        scores = _scores(shares(queries[group, rows]), keys[group], scale, scores_buffer)
        norms = joined(torch.linalg.vector_norm(scores, dim=2, keepdim=True), group)
        squares[group] += norms.square_().sum(dim=(1, 2))  # in two steps: more exact
        torch.bmm(scores, values[group].expand(len(scores), -1, -1), out=shares(out[group, rows]))
    norm = squares.sqrt_()
    out /= (norm + eps)[:, None, None]
    return out.view(B, h, N, v.shape[-1]).to(v.dtype), norm.view(B, h)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, out: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    B, h, N, _ = q.shape
    exact = norm.dtype
    queries, keys, values = _groups(q, exact), _groups(k, exact), _groups(v, exact)
    norm = norm.view(-1, 1, 1)
    grads = _groups(dout, exact)
    slope = (grads * _groups(out, exact)).sum(dim=(1, 2), keepdim=True)  # -d loss / d log(norm + eps)
    grads = grads / (norm + eps)
    shrink = slope / ((norm + eps) * norm).masked_fill_(norm == 0, 1.0)  # what a unit of score takes off by the norm
    dq = torch.empty_like(queries)
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    scores_buffer, dscores_buffer = _buffer(queries, keys), _buffer(queries, keys)
    for group, rows in tiles(B * h, N, k.shape[2], queries.element_size()):
        scores = _scores(shares(queries[group, rows]), keys[group], scale, scores_buffer)
        dv[group].baddbmm_(joined(scores, group).transpose(1, 2), grads[group, rows])
        dscores = dscores_buffer[: scores.numel()].view(scores.shape)
        near, far = (x[group].expand(len(scores), -1, -1) for x in (keys, values))
        torch.bmm(shares(grads[group, rows]), far.transpose(1, 2), out=dscores)
        torch.ops.aten.threshold_backward.grad_input(dscores, scores, 0, grad_input=dscores)
        dscores.addcmul_(scores, shrink[group], value=-1)
        torch.bmm(dscores, near, out=shares(dq[group, rows]))
        dk[group].baddbmm_(joined(dscores, group).transpose(1, 2), queries[group, rows], alpha=scale)
    dq *= scale
    return dq.view(q.shape).to(q.dtype), dk.view(k.shape).to(k.dtype), dv.view(v.shape).to(v.dtype)


def _groups(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``(B, h, N, d)`` to contiguous ``(B * h, N, d)``."""
    return x.to(dtype).contiguous().flatten(0, 1)


def _buffer(queries: Tensor, keys: Tensor) -> Tensor:
    """Memory for the largest tile of scores, taken once."""
    groups, N, _ = queries.shape
    first = next(tiles(groups, N, keys.shape[1], queries.element_size()), (slice(0, 0), slice(0, 0)))
    return queries.new_empty(first[0].stop * first[1].stop * keys.shape[1])


def _scores(queries: Tensor, keys: Tensor, scale: float, buffer: Tensor) -> Tensor:
    """Rectified scores ``(groups, queries, keys)`` of a tile, in ``buffer``."""
    shape = (*queries.shape[:2], keys.shape[1])
    scores = buffer[: shape[0] * shape[1] * shape[2]].view(shape)
    near = keys.transpose(1, 2).expand(len(queries), -1, -1)
    return torch.baddbmm(scores, queries, near, beta=0, alpha=scale, out=scores).relu_()


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float) -> tuple[Tensor, Tensor]:
    exact = torch.promote_types(q.dtype, torch.float32)
    return v.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:2], dtype=exact)


# The tile loop is opaque to compilers: its trip count depends on the shape and must not be unrolled.
_tiled = differentiable("infinite_attention_tiled", _forward, _fake, _backward, save=(0, 1))


def _pooled_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``(B, h, 1, dv)``, the queries' weights and their sum, the mean query, the keys' weights and their sum."""
    exact = torch.promote_types(q.dtype, torch.float32)
    norms = torch.linalg.vector_norm(q, dim=-1, dtype=exact).mul_(scale**0.5)[:, :, None]  # (B, h, 1, N)
    length = norms.sum(dim=-1, keepdim=True).add_(eps)
    weights = norms.div_(length)
    query = (weights @ q.to(exact)).mul_(scale)  # (B, h, 1, d)
    scores = (query @ k.to(exact).transpose(-2, -1)).relu_()  # (B, h, 1, S)
    mass = scores.sum(dim=-1, keepdim=True).add_(eps)
    attn = scores.div_(mass)
    return (attn @ v.to(exact)).to(v.dtype), weights, length, query, attn, mass


def _pooled_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float, weights: Tensor, length: Tensor,
    query: Tensor, attn: Tensor, mass: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    exact = weights.dtype
    dout, queries, keys = dout.to(exact), q.to(exact), k.to(exact)
    dscores = dout @ v.to(exact).transpose(-2, -1)  # (B, h, 1, S)
    dscores = (dscores - (dscores * attn).sum(dim=-1, keepdim=True)).div_(mass).masked_fill_(attn == 0, 0.0)
    dmean = (dscores @ keys).mul_(scale)  # (B, h, 1, d)
    dweights = dmean @ queries.transpose(-2, -1)  # (B, h, 1, N)
    # The slope of a norm is the query over its norm, and none where it is zero; norms are weights times their sum.
    slope = (dweights - (dweights * weights).sum(dim=-1, keepdim=True)).mul_(scale)
    slope = (slope / (weights * length.square())).masked_fill_(weights == 0, 0.0)
    dq = queries * slope.transpose(-2, -1)
    dq.addcmul_(weights.transpose(-2, -1), dmean)
    dk, dv = dscores.transpose(-2, -1) * query, attn.transpose(-2, -1) * dout
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _pooled_fake(q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float) -> tuple[Tensor, ...]:
    B, h, N, d = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    out = v.new_empty(B, h, 1, v.shape[-1])
    return out, *(q.new_empty(B, h, 1, n, dtype=exact) for n in (N, 1, d, k.shape[2], 1))


_pooled = differentiable(
    "infinite_attention_pooled", _pooled_forward, _pooled_fake, _pooled_backward, save=(1, 2, 3, 4, 5)
)
