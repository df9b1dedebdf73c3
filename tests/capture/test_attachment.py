"""Tests of attaching to a model: nothing is added to it, and nothing stays behind."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import grutrace
from tests.capture.models import hooks
from tests.leaks import kernels_are_overridden


def test_attaching_adds_nothing_to_the_model(model, batch) -> None:
    tracer = grutrace.Tracer(model, recording=False)
    with tracer:
        assert not kernels_are_overridden()
        model(batch)
        assert len(trace_calls := tracer.calls) == 0
        tracer.start("later")
        assert kernels_are_overridden()
        assert hooks(model) == 0
        model(batch)
        tracer.stop()
        assert not kernels_are_overridden()
        model(batch)
    assert len(trace_calls) == 0
    assert len(tracer.calls) == 1 + 3
    assert set(tracer.calls["tag"]) == {"later"}


def test_the_constructor_attaches_nothing(model) -> None:
    tracer = grutrace.Tracer(model)
    assert hooks(model) == 0
    tracer.close()


class Interruption(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("error", [ValueError, Interruption])
@pytest.mark.parametrize("layers", [1, 2])
def test_every_exit_removes_the_hooks(error, layers, tmp_path) -> None:
    layer = nn.GRU(2, 3, layers)

    def fail(*_: object) -> None:
        raise error("on purpose")

    handle = layer.register_forward_hook(fail)
    path = tmp_path / "run.h5"
    with pytest.raises(error, match="on purpose"), grutrace.trace(layer, path):
        layer(torch.randn(4, 2, 2))
    handle.remove()
    assert hooks(layer) == 0
    assert torch.overrides._get_current_function_mode() is None
    with grutrace.open(path) as trace:
        assert len(trace["l0"]) == 2


@pytest.mark.parametrize("error", [ValueError, Interruption])
def test_an_exception_inside_a_stacked_forward(error) -> None:
    class Failing(nn.GRU):
        def forward(self, *args):
            super().forward(*args)
            if self.fails:
                raise error("on purpose")

    layer = Failing(2, 3, 2)
    with grutrace.trace(layer) as trace:
        layer.fails = True
        with pytest.raises(error, match="on purpose"):
            layer(torch.randn(4, 2, 2))
        layer.fails = False
        layer(torch.randn(4, 2, 2))
        assert len(trace["l1"]) == 4
    assert hooks(layer) == 0
    assert torch.overrides._get_current_function_mode() is None


def test_stopping_within_a_forward_leaves_nothing() -> None:
    class Stopping(nn.GRU):
        def forward(self, *args):
            tracer.stop()
            return super().forward(*args)

    layer = Stopping(2, 3, 2)
    tracer = grutrace.Tracer(layer)
    tracer.start()
    layer(torch.randn(4, 2, 2))
    assert hooks(layer) == 0
    assert torch.overrides._get_current_function_mode() is None
    with pytest.warns(grutrace.GrutraceWarning, match="nothing was recorded of the model"):
        tracer.close()


def test_two_tracers_on_one_stack_split_it_once() -> None:
    layer, x = nn.GRU(2, 3, 3, bidirectional=True), torch.randn(4, 2, 2)
    expected = layer(x)
    with grutrace.trace(layer) as outer, grutrace.trace(layer, sites="l1*") as inner:
        result = layer(x)
    assert all(map(torch.equal, expected, result))
    assert len(outer.calls) == len(inner.calls) == 1
    np.testing.assert_array_equal(outer["l1"].update, inner["l1"].update)


def test_copies_of_an_attached_model_are_not_traced(model, batch) -> None:
    with grutrace.trace(model) as trace:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies = [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(buffer, weights_only=False),
        ]
        for model_copy in copies:
            model_copy(batch)
        assert len(trace.calls) == 0
        model(batch)
    assert all(b"grutrace" not in pickle.dumps(copy) for copy in copies)


def test_a_rebound_tracer_is_closed(tmp_path) -> None:
    """As in a notebook cell that runs again."""
    layer, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    for number in range(3):
        path = tmp_path / f"{number}.h5"
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")
            tracer = grutrace.Tracer(layer, path)
        assert len(messages) == bool(number), messages
        tracer.start()
        layer(x)
        if number:
            assert "a tracer was garbage-collected while recording" in str(messages[0].message)
            with grutrace.open(tmp_path / f"{number - 1}.h5") as before:
                assert before.closed
                assert len(before.calls) == 1
    tracer.close()
    assert not kernels_are_overridden()


def test_two_tracers_may_be_open() -> None:
    layer, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    held = [grutrace.Tracer(layer) for _ in range(2)]
    for tracer in held:
        tracer.start()
    layer(x)
    assert [len(tracer.calls) for tracer in held] == [1, 1]
    for tracer in held:
        tracer.close()
