"""The definition, with the gathered keys and values written out."""

from torch import Tensor

from visionattn.ops.neighborhood_attention._windows import Pair, neighborhood


def why_not(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel_size: Pair, dilation: Pair, scale: float
) -> str | None:
    """The reference takes everything."""
    return None


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel_size: Pair, dilation: Pair, scale: float
) -> Tensor:
    """Gather the neighbours of every token, then attend."""
    (B, h, H, W, _), K = q.shape, kernel_size[0] * kernel_size[1]
    (rows, row_offsets), (cols, col_offsets) = (
        neighborhood(length, size, d, q.device) for length, size, d in zip((H, W), kernel_size, dilation, strict=True)
    )  # (H, Kh) and (W, Kw)
    index = (rows[:, None, :, None] * W + cols.unsqueeze(1)).flatten()  # (H * W * Kh * Kw)
    k, v = (
        x.flatten(2, 3).index_select(2, index).view(B, h, H * W, K, x.shape[-1]) for x in (k, v)
    )  # (B, h, N, Kh * Kw, d)
    logits = (k @ (q.flatten(2, 3) * scale)[..., None])[..., 0]  # (B, h, N, Kh * Kw)
    if bias is not None:
        picked = bias[:, row_offsets[:, None, :, None], col_offsets.unsqueeze(1)]  # (h, H, W, Kh, Kw)
        logits = logits + picked.flatten(3).flatten(1, 2).to(logits.dtype)
    out = logits.softmax(dim=-1)[..., None, :] @ v  # (B, h, N, 1, dv)
    return out[..., 0, :].unflatten(2, (H, W))
