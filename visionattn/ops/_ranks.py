"""Which implementations of an operator are the fastest, by device, dtype and size: measured, and written by a command.

``python tools/benchmark.py ranks`` writes everything from `SOURCES` on, out of the committed measurements.
"""

from typing import NamedTuple


class Rank(NamedTuple):
    """Up to so many elements of the queries (None: however many), the implementations measured there, in order."""

    upto: int | None
    order: tuple[str, ...]


# Where each device's rows were measured, and those rows by operator, device ("sm_90", "gfx942") and dtype.
SOURCES: dict[str, tuple[str, ...]] = {}
RANKS: dict[tuple[str, str, str], tuple[Rank, ...]] = {}
