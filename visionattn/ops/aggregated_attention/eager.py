"""Fast plain PyTorch: sums over the shifted maps of keys and values; the pool's weights at once or in chunks."""

from torch import Tensor

from visionattn.ops._dispatch import exporting
from visionattn.ops.aggregated_attention._chunked import chunked
from visionattn.ops.aggregated_attention._whole import whole

KEPT = 4  # weights a token and channel that are kept for the backward pass: as many numbers as q, k, v and the result


def why_not(*tensors: Tensor | None) -> str | None:
    """Everything runs, but opaque operators cannot be exported."""
    return "its chunk loop is opaque to exporters" if exporting() else None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    bias_local: Tensor,
    bias_pool: Tensor,
    extra: Tensor | None,
) -> Tensor:
    """Attend at once where weights are few, else chunk by chunk."""
    few = bias_local.shape[1] + k_pool.shape[2] <= KEPT * q.shape[-1]
    out: Tensor = (whole if few else chunked)(q, k, v, k_pool, v_pool, bias_local, bias_pool, extra)
    return out
