"""InfViT's infinite self-attention."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionattn.ops import Impl, get_impl, infinite_attention
from visionattn.ops.infinite_attention import Form


class InfiniteAttention(nn.Module):
    """Infinite self-attention of tokens ``(B, N, C)``, with a learned discount shared by the heads.

    In the linear form all tokens receive one and the same vector.

    Args:
        dim: Channels.
        num_heads: Heads; ``dim`` must be a multiple.
        form: ``"pure"`` or ``"linear"``; see `visionattn.ops.infinite_attention`.
        rho_init: The discount at the start, in (0, 1).
        impl: Implementation of the operator. Unless one is named, the linear form does not call it: it never projects
            the keys and values.
    """

    def __init__(
        self, dim: int, *, num_heads: int, form: Form = "pure", rho_init: float = 0.95, impl: Impl = "auto"
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        if form not in ("pure", "linear"):
            raise ValueError(f"form must be 'pure' or 'linear', got {form!r}")
        if not 0 < rho_init < 1:
            raise ValueError(f"rho_init must be between 0 and 1, got {rho_init}")
        self.num_heads, self.form, self.impl = num_heads, form, impl
        self.rho_logit = nn.Parameter(torch.tensor(math.log(rho_init / (1 - rho_init))))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Attend; ``size``, which hosts of tokens hand to every mixer, has no bearing."""
        B, N, C = x.shape
        rho = self.rho_logit.sigmoid()
        if self.form == "linear" and self.impl == get_impl() == "auto":
            y = self._pool(x, rho)
        else:
            q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
            y = infinite_attention(q, k, v, rho, form=self.form, impl=self.impl).transpose(1, 2).flatten(2)
        return self.proj(y).expand(B, N, C)  # one row in the linear form

    def _pool(self, x: Tensor, rho: Tensor, eps: float = 1e-6) -> Tensor:
        """The linear form with the projections of keys and values moved to where there is one row a head.

        A mean query scores the keys ``W x + b`` as its image under ``W`` scores the tokens, and a weighted sum of
        values is the projection of the sum of tokens: N * C * heads multiplications each, in place of N * C * C.
        ``(B, N, C)`` to ``(B, 1, C)``.
        """
        B, N, C = x.shape
        h, d = self.num_heads, C // self.num_heads
        exact = torch.promote_types(x.dtype, torch.float32)
        wq, wk, wv = self.qkv.weight.chunk(3)
        bq, bk, bv = self.qkv.bias.chunk(3)
        q = F.linear(x, wq, bq).view(B, N, h, d)
        norms = torch.linalg.vector_norm(q, dim=-1, dtype=exact) * d**-0.5  # (B, N, h)
        weights = norms / (norms.sum(dim=1, keepdim=True) + eps)
        query = torch.einsum("bnh,bnhd->bhd", weights.to(q.dtype), q)
        images = torch.einsum("bhd,hdc->bhc", query, wk.view(h, d, C))
        offset = torch.einsum("bhd,hd->bh", query, bk.view(h, d))
        scores = (images @ x.transpose(1, 2) + offset[..., None]).relu().to(exact) / d  # (B, h, N)
        attn = scores / (scores.sum(dim=-1, keepdim=True) + eps)
        pooled = attn.to(x.dtype) @ x  # (B, h, C)
        y = torch.einsum("bhc,hdc->bhd", pooled, wv.view(h, d, C))
        y = y + attn.sum(dim=-1, keepdim=True).to(y.dtype) * bv.view(h, d)
        return (rho.to(y.dtype) * y).reshape(B, 1, C)
