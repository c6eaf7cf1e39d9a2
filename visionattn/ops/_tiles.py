"""Walk over an attention matrix in tiles that fit a cache, without ever holding the whole of it."""

from collections.abc import Iterator

TILE_BYTES = 2**21  # of scores at a time: two such buffers live in a core's second-level cache


def tiles(groups: int, queries: int, keys: int, itemsize: int) -> Iterator[tuple[slice, slice]]:
    """Yield ``(groups, queries)`` slices that cover a ``(groups, queries, keys)`` matrix.

    Every tile holds all keys: some whole groups (a batch item's head each) where one fits, else a run of one group's
    queries.
    """
    row = max(1, keys * itemsize)
    if queries * row <= TILE_BYTES:
        step = _even(groups, TILE_BYTES // max(1, queries * row))
        for start in range(0, groups, step):
            yield slice(start, min(start + step, groups)), slice(0, queries)
        return
    step = _even(queries, TILE_BYTES // row)
    for group in range(groups):
        for start in range(0, queries, step):
            yield slice(group, group + 1), slice(start, min(start + step, queries))


def _even(length: int, most: int) -> int:
    """Length of equal pieces, as few as it takes to stay at about ``most``; an even one, which two threads share."""
    pieces = -(-length // max(1, most))
    step = -(-length // max(1, pieces))
    return max(1, step + step % 2) if pieces > 1 and most > 1 else max(1, step)
