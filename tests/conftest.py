from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch

from grutrace.capture import selection
from grutrace.native import library
from tests.instruction_sets import INSTRUCTION_SETS
from tests.leaks import Watch

pytest_plugins = ["pytester"]

# A shell's background jobs ignore Ctrl-C, and their children too. Tests that interrupt a process
# would wait forever.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure() -> None:
    """In a worker of pytest-xdist, run torch on one thread, here and in child processes."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)


# First, because pytest-xdist reads the groups in the same hook.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With --dist loadgroup, run the tests that measure something in one worker, one by one."""
    for item in items:
        if item.get_closest_marker("measures"):
            item.add_marker(pytest.mark.xdist_group("measures"))


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """No test leaves a listener, a TorchFunctionMode, a thread or an open file behind."""
    watch = Watch()
    yield
    assert watch.leaks() == []


@pytest.fixture(autouse=True)
def background_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the thread that writes compute gates on a CPU, so that it is tested without a device."""
    monkeypatch.setattr(selection, "BACKGROUND_ON_CPU", True)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Run the test with each instruction set of this processor, and without the compiled part."""
    monkeypatch.setenv(library.VARIABLE, request.param)
    library.load.cache_clear()
    assert library.instruction_set() == request.param
    yield request.param
    monkeypatch.undo()
    library.load.cache_clear()
