"""Tests of kernels that are registered and removed while other threads run the model."""

from __future__ import annotations

import sys
import threading

import torch
from torch import nn

from grutrace.capture.kernel_calls import registration
from grutrace.capture.kernel_calls import subscription as kernel_calls
from tests import forks
from tests.interruptions import AtLine, Interruption
from tests.leaks import kernels_are_overridden


def test_kernels_are_registered_and_removed_while_threads_run(monkeypatch) -> None:
    """A removed kernel is kept while a thread may be about to call it."""
    cell, x, h = nn.GRUCell(4, 8), torch.randn(2, 4), torch.zeros(2, 8)
    expected, end, errors, calls = cell(x, h), threading.Event(), [], [0] * 3

    def run(number: int) -> None:
        with torch.no_grad():
            while not end.is_set():
                try:
                    assert torch.equal(cell(x, h), expected)
                    calls[number] += 1
                except BaseException as error:
                    errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for worker in threads:
        worker.start()
    received = []
    try:
        for _ in range(200):
            subscription = kernel_calls.Subscription(cell, received.append)
            subscription.start()
            subscription.stop()
    finally:
        end.set()
        for thread in threads:
            thread.join()
    assert not errors
    assert all(calls)
    assert not kernels_are_overridden()


def test_an_interruption_of_the_removal_leaves_gradients_and_is_made_up_for(monkeypatch) -> None:
    # Before PyTorch 2.9, kernels stay while another thread runs Python. None calls a GRU here.
    monkeypatch.setattr(sys, "_current_frames", lambda: {0: None})
    cell, x = nn.GRUCell(4, 8), torch.randn(2, 4)
    cell(x).sum().backward()
    expected = cell.weight_ih.grad.clone()
    places, is_interrupted = 0, True
    while is_interrupted:
        places += 1
        received: list[object] = []
        subscription = kernel_calls.Subscription(cell, received.append)
        subscription.start()
        try:
            with AtLine(places, Interruption, (registration.__file__,)):
                subscription.stop()
            is_interrupted = False
        except Interruption:
            pass
        # PyTorch warns of a kernel without gradients, and warnings are errors.
        cell.zero_grad()
        cell(x).sum().backward()
        assert torch.equal(cell.weight_ih.grad, expected)
        assert not received
        subscription.stop()
        again = kernel_calls.Subscription(cell, received.append)
        again.start()
        cell(x).sum().backward()
        again.stop()
        assert len(received) == 1
    assert places > 15
    assert not kernels_are_overridden()


STAYING = """
import threading
import grutrace, torch
from torch import nn
from grutrace.capture.kernel_calls import registration
from grutrace.capture.kernel_calls.subscription import is_observing
from tests import forks

registration._kernel_handle = lambda *_: None
layer, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
end = threading.Event()
other = threading.Thread(target=end.wait)
other.start()
with grutrace.trace(layer) as trace:
    layer(x)
assert is_observing()
expected = layer(x)
end.set()
other.join()
with grutrace.trace(layer) as again:
    assert all(map(torch.equal, layer(x), expected))
assert not is_observing()
assert len(trace.calls) == len(again.calls) == 1
"""


def test_a_kernel_stays_while_threads_may_call_it() -> None:
    """Without a handle to a removed kernel, it is removed once no other thread runs Python.

    In a process of its own: a test runner may have threads.
    """
    done = forks.run("-c", STAYING)
    assert done.returncode == 0, done.stderr


def test_a_newer_torch_than_was_tested_is_used_with_one_log_line(monkeypatch, caplog) -> None:
    cell, x = nn.GRUCell(4, 8), torch.randn(2, 4)
    lines = []
    for version in ("2.15.1+cpu", "2.4.1", "2.16.0.dev20270101", "3.0a0"):
        monkeypatch.setattr(torch, "__version__", version)
        registration.log_untested_version.cache_clear()
        caplog.clear()
        with caplog.at_level("INFO", registration.__name__):
            for _ in range(2):
                received: list[object] = []
                subscription = kernel_calls.Subscription(cell, received.append)
                subscription.start()
                cell(x)
                subscription.stop()
                assert len(received) == 1
        lines.append([message for *_, message in caplog.record_tuples])
    registration.log_untested_version.cache_clear()
    assert [len(each) for each in lines] == [0, 0, 1, 1]
    assert "torch 3.0a0 is newer than 2.15, the newest" in lines[3][0]
