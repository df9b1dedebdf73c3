"""What a run loses to a sink that fails, where it goes on untraced."""

from __future__ import annotations

import threading

from grutrace.errors import SinkError


class Losses:
    """Whether the sink has failed, and how many calls there were. From any thread.

    Attributes:
        error: Why the sink failed; None while it has not.
        calls: Calls that were given to the sink, and those that came after it had failed.
    """

    def __init__(self) -> None:
        self.error: SinkError | None = None
        self.calls = 0
        self._lock = threading.Lock()

    def count(self) -> None:
        """Count a call."""
        with self._lock:
            self.calls += 1

    def fail(self, error: SinkError) -> bool:
        """Note that the sink has failed; whether that is news."""
        with self._lock:
            is_news = self.error is None
            self.error = self.error or error
        return is_news
