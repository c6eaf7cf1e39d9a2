"""Stopping a run in order: by SIGINT or SIGTERM, or because its time is nearly up."""

from __future__ import annotations

import math
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any


class Stopped(Exception):
    """Raised inside a validation that is given up because the run must stop."""


class StopSignal:
    """While entered, the first SIGINT or SIGTERM is noted in ``received``; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        """Install the handlers (in the main thread only, as Python allows)."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the earlier handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


class TimeLimit:
    """Says when a run has to stop so that saving its state still fits into its time.

    Args:
        minutes: the run's time, from now on; ``None`` for no limit.
        updates: how many updates may pass between two looks at it.
    """

    _FORGET = 0.9  # the longest update counts less with each later one: the first compiles, and is no measure

    def __init__(self, minutes: float | None, updates: int) -> None:
        self._updates, self._last = updates, time.monotonic()
        self._end = math.inf if minutes is None else self._last + 60 * minutes
        self._update = self._save = 0.0  # seconds that the longest took

    def updated(self) -> None:
        """Note the end of an update."""
        now = time.monotonic()
        self._update, self._last = max(now - self._last, self._FORGET * self._update), now

    def saved(self, seconds: float) -> None:
        """Note how long saving took; it is no part of the next update."""
        self._save = max(self._save, seconds)
        self._last = time.monotonic()

    def near(self) -> bool:
        """Whether the updates until the next look, and saving, might not fit any more; both are given double."""
        return self._end - time.monotonic() < 2 * (self._updates * self._update + self._save) + 1
