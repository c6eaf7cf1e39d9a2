"""Walk over an attention matrix in tiles that fit a cache, without ever holding the whole of it."""

from collections.abc import Iterator

import torch
from torch import Tensor

TILE_BYTES = 2**21  # of scores at a time: two such buffers live in a core's second-level cache


def tiles(groups: int, queries: int, keys: int, itemsize: int) -> Iterator[tuple[slice, slice]]:
    """Yield ``(groups, queries)`` slices that cover a ``(groups, queries, keys)`` matrix.

    Every tile holds all keys: some whole groups (a batch item's head each) where one fits, else a run of one group's
    queries.
    """
    row = max(1, keys * itemsize)
    if queries * row <= TILE_BYTES:
        step = even(groups, TILE_BYTES // max(1, queries * row))
        for start in range(0, groups, step):
            yield slice(start, min(start + step, groups)), slice(0, queries)
        return
    step = even(queries, TILE_BYTES // row)
    for group in range(groups):
        for start in range(0, queries, step):
            yield slice(group, group + 1), slice(start, min(start + step, queries))


def shares(x: Tensor) -> Tensor:
    """Cut ``(1, n, d)`` into a group for each thread, ``(threads, n / threads, d)``, where that comes out even.

    In products of such groups a thread writes rows of its own, which it finds in its cache when it comes to them again.
    Threads share a single product by columns, so that the lines of every row travel between cores.
    """
    threads = torch.get_num_threads()
    if len(x) != 1 or x.shape[1] % threads or not x.is_cpu:
        return x
    return x[0].unflatten(0, (threads, -1))


def joined(x: Tensor, group: slice) -> Tensor:
    """Undo `shares` of a contiguous tensor: ``(groups, n, d)`` again, of the groups that `tiles` yielded."""
    return x.view(group.stop - group.start, -1, x.shape[2])


def even(length: int, most: int) -> int:
    """Length of equal pieces, as few as it takes to stay at about ``most``; one that the threads can share."""
    pieces = -(-length // max(1, most))
    step = -(-length // max(1, pieces))
    threads = torch.get_num_threads()
    return max(1, step + -step % threads) if pieces > 1 and most >= threads else max(1, step)
