from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.leaks import Watch

pytest_plugins = ["pytester"]

# A shell's background jobs ignore Ctrl-C, and so do their children: tests that interrupt a process
# would wait for it in vain.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """No test leaves a listener, a TorchFunctionMode, a thread or an open file behind."""
    watch = Watch()
    yield
    assert watch.leaks() == []
