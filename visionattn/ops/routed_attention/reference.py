"""The definition, with the gathered keys and values written out."""

from torch import Tensor

from visionattn.ops.routed_attention._regions import to_map, to_regions


def why_not(q: Tensor, k: Tensor, v: Tensor, index: Tensor, grid: tuple[int, int], scale: float) -> str | None:
    """The reference takes everything."""
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, index: Tensor, grid: tuple[int, int], scale: float) -> Tensor:
    """Gather the routed regions of every query region, then attend."""
    size = (q.shape[2], q.shape[3])
    q, k, v = (to_regions(x, grid) for x in (q, k, v))  # (B, h, P, T, d)
    k, v = gather(k, index), gather(v, index)  # (B, h, P, topk * T, d)
    attn = ((q * scale) @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, h, P, T, topk * T)
    return to_map(attn @ v, grid, size)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Collect the tokens of the regions ``index (B, P, topk)`` from ``x (B, h, P, T, d)``."""
    B, h, P, T, d = x.shape
    index = index.reshape(B, 1, -1, 1, 1).expand(-1, h, -1, T, d)
    return x.gather(2, index).reshape(B, h, P, -1, d)
