"""Tests of threads that run one model while tracers start and stop."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

from tests.integration.models import CALLS, Mixed, assert_same, eagerly, trace


def in_threads(*functions) -> list[BaseException]:
    """Run functions at once; the errors that they raised."""
    errors: list[BaseException] = []

    def run(function) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for worker in threads:
        worker.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize("path", [None, "run.h5"])
def test_threads_that_run_one_model(path, model, tmp_path) -> None:
    batches = torch.randn(4, 10, 2, 5, 3)
    expected = {model(batch).detach().numpy().tobytes() for batch in batches.flatten(0, 1)}
    results: list[bytes] = []

    def run(own) -> None:
        with torch.no_grad():
            results.extend(model(batch).numpy().tobytes() for batch in own)

    with trace(model, path=path and tmp_path / path) as tracer:
        assert not in_threads(*(lambda own=own: run(own) for own in batches))
    assert set(results) == expected
    assert len(results) == len(expected) == 40
    assert len(tracer.calls) == 40 * len(CALLS)
    assert tracer["cell.cell"].lengths.tolist() == [2] * 80
    inputs = {sequence.input.tobytes() for sequence in tracer["stack.l0"]}
    assert inputs == {(2 * batch).numpy().tobytes() for batch in batches.flatten(0, 2)}


# The threads run the very same batch, so their decoders are in the same states.
@pytest.mark.filterwarnings("ignore:cannot tell which sequence a call of cell continues")
def test_recording_starts_and_stops_while_other_threads_run_the_model(model, batch) -> None:
    expected = model(batch)
    tracer = trace(model)
    rounds, done = 25, threading.Event()
    modes: list[int] = []

    def run() -> None:
        while not done.is_set():
            assert torch.equal(model(batch), expected)
        modes.append(len(_get_current_function_mode_stack()))

    def switch() -> None:
        try:
            for _ in range(rounds):
                tracer.start()
                assert torch.equal(model(batch), expected)
                tracer.stop()
                assert not tracer.is_recording
        finally:
            done.set()

    assert not in_threads(run, run, switch)
    assert modes == [0, 0]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    tracer.close()
    assert len(tracer.calls) >= rounds * len(CALLS)


def test_started_in_one_thread_and_closed_in_another(model, batch) -> None:
    tracer = trace(model)
    assert not in_threads(tracer.start)
    model(batch)
    assert not in_threads(tracer.close)
    assert tracer.calls["module"].tolist() == CALLS
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_control_an_error_in_a_thread_is_seen() -> None:
    assert len(in_threads(lambda: 1 / 0)) == 1


@pytest.mark.parametrize("first", ["split", "rerun"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_tracers_may_end_in_any_order(order, first, model, batch) -> None:
    expected, eager = eagerly(model, lambda: model(batch))
    tracers = [trace(model, stacks=mode) for mode in (first, "auto", "split")]
    for attached in tracers:
        attached.start()
    for number in order:
        assert torch.equal(model(batch), expected)
        tracers[number].close()
    assert torch.equal(model(batch), expected)
    assert sorted(len(tracer.calls) for tracer in tracers) == [4, 8, 12]
    assert_same(eager, tracers[order[0]])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_tracer_within_a_traced_forward(model, batch) -> None:
    """A part of the model is traced from inside the traced model."""
    _, eager = eagerly(model, lambda: model(batch))
    inner = []

    def before(*_: object) -> None:
        inner.append(trace(model.stack))
        inner[-1].start()

    handles = [
        model.stack.register_forward_pre_hook(before),
        model.stack.register_forward_hook(lambda *_: inner[-1].close(), prepend=False),
    ]
    with trace(model) as tracer:
        model(batch)
    for handle in handles:
        handle.remove()
    assert_same(eager, tracer)
    assert len(inner[0].calls) == 1
    np.testing.assert_array_equal(inner[0]["l1"].update, tracer["stack.l1"].update)


def test_a_traced_model_within_a_traced_model(batch) -> None:
    """One model's forward runs another; each has its own tracer."""
    torch.manual_seed(1)
    inner, outer = Mixed().eval(), Mixed().eval()
    _, eager = eagerly(inner, lambda: inner(batch))

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer, self.inner = outer, inner

        def forward(self, x):
            self.inner(batch)
            return self.outer(x)

    with trace(outer) as around, trace(inner) as within, trace(whole := Outer()) as both:
        whole(batch)
    assert around.calls["module"].tolist() == within.calls["module"].tolist() == CALLS
    assert len(both.calls) == 2 * len(CALLS)
    assert_same(eager, within)
