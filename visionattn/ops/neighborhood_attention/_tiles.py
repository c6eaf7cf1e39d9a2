"""Cover a map with small tiles of queries, each with the rectangle of keys that its windows reach."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from visionattn.ops.neighborhood_attention._windows import Pair


@dataclass(frozen=True)
class Axis:
    """The ``t`` tiles of one axis: ``T`` queries and ``S`` keys each. Slots left over repeat a token."""

    queries: Tensor  # (t, T) tokens
    is_query: Tensor  # (t, T) False where the slot is left over
    keys: Tensor  # (t, S) tokens
    is_key: Tensor  # (t, S)
    pattern: Tensor  # (t,) which entry of offsets the tile has
    offsets: Tensor  # (patterns, T, S) where the bias is read; 2 * kernel_size - 1 is outside of the window


@dataclass(frozen=True)
class Tiling:
    """The ``t`` tiles of a map of N tokens: ``T`` queries and ``S`` keys each; all are int64."""

    tile_queries: int  # T
    tile_keys: int  # S
    queries: Tensor  # (t * T,) tokens
    keys: Tensor  # (t * S,) tokens
    is_query: Tensor | None  # (t * T, 1) False where the slot is left over; None if no slot is
    query_slot: Tensor  # (N,) the slot that computes each token
    key_slots: Tensor  # the slots that hold token 0, then those of token 1, ...
    key_slot_starts: Tensor  # (N,) where those of each token begin
    pattern: Tensor  # (t,) which entry of offsets the tile has
    offsets: Tensor  # (patterns, T * S) where the bias table, extended by a row and a column, is read


def best_tile(length: int, kernel_size: int, dilation: int) -> int:
    """Return how many queries to put in a tile: few enough to mask little, enough to gather keys seldom."""
    longest = -(-length // dilation)

    def cost(tile: int) -> int:  # dear per logit, and per gathered key as much as four logits (measured on a CPU)
        return -(-longest // tile) * min(tile + kernel_size - 1, longest) * (tile + 4)

    return min(range(1, min(longest, 16) + 1), key=cost)


@lru_cache(maxsize=256)
def tiling(size: Pair, kernel_size: Pair, dilation: Pair, device: torch.device) -> Tiling:
    """Tile a map. The result is kept, so this must not be called where tensors are traced."""
    rows, cols = (_tile_axis(n, K, d, device) for n, K, d in zip(size, kernel_size, dilation, strict=True))
    tokens = size[0] * size[1]

    def flat(a: Tensor, b: Tensor) -> Tensor:  # (t, T) and (u, U) to (t * u * T * U,)
        return (a[:, None, :, None] + b[None, :, None]).flatten()

    queries, keys = flat(rows.queries * size[1], cols.queries), flat(rows.keys * size[1], cols.keys)
    left_over = flat(~rows.is_query, ~cols.is_query)  # + of booleans is "or"
    slots = (~left_over).nonzero()[:, 0]
    query_slot = torch.empty(tokens, dtype=torch.int64, device=device)
    query_slot[queries[slots]] = slots
    key_slots = (~flat(~rows.is_key, ~cols.is_key)).nonzero()[:, 0]
    held = keys[key_slots]
    counts = torch.bincount(held, minlength=tokens)
    offsets = rows.offsets[:, None, :, None, :, None] * 2 * kernel_size[1] + cols.offsets[None, :, None, :, None]
    T = rows.queries.shape[1] * cols.queries.shape[1]
    S = rows.keys.shape[1] * cols.keys.shape[1]
    return Tiling(
        tile_queries=T,
        tile_keys=S,
        queries=queries,
        keys=keys,
        is_query=~left_over[:, None] if bool(left_over.any()) else None,
        query_slot=query_slot,
        key_slots=key_slots[held.argsort(stable=True)],
        key_slot_starts=counts.cumsum(0) - counts,
        pattern=(rows.pattern[:, None] * len(cols.offsets) + cols.pattern).flatten(),
        offsets=offsets.reshape(-1, T * S),
    )


def _tile_axis(length: int, kernel_size: int, dilation: int, device: torch.device) -> Axis:
    """Tile every class of tokens that are equal modulo the dilation; positions count tokens of a class."""
    tile = best_tile(length, kernel_size, dilation)
    sizes = [(length - 1 - residue) // dilation + 1 for residue in range(dilation)]
    span = min(tile + kernel_size - 1, max(sizes))
    begins = [(residue, size, first) for residue, size in enumerate(sizes) for first in range(0, size, tile)]
    residue, size, first = torch.tensor(begins, device=device).T[:, :, None]  # 3 x (t, 1)

    queries = first + torch.arange(tile, device=device)  # (t, T) positions
    is_query = queries < size
    queries = torch.minimum(queries, size - 1)
    start = torch.minimum((first - kernel_size // 2).clamp(min=0), (size - span).clamp(min=0))
    keys = start + torch.arange(span, device=device)  # (t, S) positions
    is_key = keys < size

    window = torch.minimum((queries - kernel_size // 2).clamp(min=0), size - kernel_size)[:, :, None]  # its first key
    inside = (keys[:, None] >= window) & (keys[:, None] < window + kernel_size)  # (t, T, S)
    offsets = torch.where(inside, keys[:, None] - queries[:, :, None] + kernel_size - 1, 2 * kernel_size - 1)
    offsets, pattern = torch.unique(offsets, dim=0, return_inverse=True)
    keys = torch.minimum(keys, size - 1)
    return Axis(queries * dilation + residue, is_query, keys * dilation + residue, is_key, pattern, offsets)
