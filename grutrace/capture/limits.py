"""How much a trace may become."""

from __future__ import annotations

import threading
from collections.abc import Callable


class LimitReached(Exception):
    """The call goes beyond what the trace may become. Never seen by a user."""


class Limits:
    """Counts what is recorded, from any thread.

    Args:
        max_calls: How many calls there may be, of all modules together; None for any number.
        max_bytes: Likewise of rows, initial states and weights.

    Attributes:
        reached: Whether no more may come.
    """

    def __init__(self, max_calls: int | None = None, max_bytes: int | None = None) -> None:
        self._max_calls, self._max_bytes = max_calls, max_bytes
        self._calls = self._bytes = 0
        self._lock = threading.Lock()
        self.reached = False

    def clear(self) -> None:
        """Count anew from 0."""
        with self._lock:
            self._calls = self._bytes = 0
            self.reached = False

    def take(self, size: Callable[[], int]) -> None:
        """Count a call.

        Args:
            size: Returns its bytes, with those of the weights that it announces.

        Raises:
            LimitReached: It goes beyond. Then nothing more may come, be it smaller.
        """
        nbytes = 0
        if self._max_bytes is not None:
            nbytes = size()
        with self._lock:
            too_large = self._max_bytes is not None and self._bytes + nbytes > self._max_bytes
            if self.reached or too_large:
                self.reached = True
                raise LimitReached
            self._calls += 1
            self._bytes += nbytes
            self.reached = self._calls == self._max_calls
