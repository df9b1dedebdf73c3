"""An exception or Ctrl-C at any point of a recorded call leaves nothing behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

import grutrace
from grutrace.capture.kernel_calls import subscription
from tests.integration.models import trace
from tests.interruptions import AtLine, Fault, Interruption

#: xdist starts groups first; these tests take long, and alone they would come last.
pytestmark = pytest.mark.xdist_group("interruptions")


class AtFunction(TorchFunctionMode):
    """Raises at the k-th function of torch's that the model calls."""

    def __init__(self, line: int, error: type[BaseException]) -> None:
        super().__init__()
        self.left, self.error = line, error

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            raise self.error("on purpose")
        return func(*args, **(kwargs or {}))


def places(kind, run) -> int:
    """At how many places a run can be interrupted."""
    never = kind(10**9, Fault)
    with never:
        run()
    return 10**9 - never.left


@pytest.fixture
def batch() -> torch.Tensor:
    return torch.randn(2, 3, 3)


#: A prime stride over the places of a run, to stay quick; each kind of error starts elsewhere.
STRIDES = {AtFunction: 1, AtLine: 23}


def is_interrupted(injector, error, model, batch) -> bool:
    try:
        with injector:
            model(batch)
    except error:
        return True
    return False


#: A call that is repeated after an interruption ends in the same states as the interrupted one.
AMBIGUOUS = pytest.mark.filterwarnings("ignore:cannot tell which sequence a call of cell")


@AMBIGUOUS
@pytest.mark.parametrize("stacks", ["split", "rerun"])
@pytest.mark.parametrize("error", [Fault, Interruption])
@pytest.mark.parametrize("kind", [AtFunction, AtLine])
def test_an_error_at_any_point_of_a_recorded_call(
    kind, error, stacks, model, batch, tmp_path
) -> None:
    expected = model(batch)
    with trace(model, stacks=stacks) as recorded:
        model(batch)
        count = places(kind, lambda: model(batch))
    assert count > 10
    hidden = recorded["cell.cell"].sequence(0).hidden
    stride = STRIDES[kind]
    tracer = trace(model, stacks=stacks)
    with tracer:
        for line in range(1 + (stride // 2 if error is Fault else 0), count + 1, stride):
            calls = len(tracer.calls)
            if not is_interrupted(kind(line, error), error, model, batch):
                # How many places there are depends on whether weights are compared or sampled.
                assert line > 0.8 * count
                break
            # It can be used at once, and everything is recorded.
            between = len(tracer.calls)
            assert calls <= between <= calls + 4
            assert torch.equal(model(batch), expected)
            assert len(tracer.calls) == between + 4
            np.testing.assert_allclose(
                tracer["cell.cell"].sequence(-1).hidden[-1],
                recorded["cell.cell"].sequence(-1).hidden[-1],
                rtol=0,
                atol=1e-6,
            )
            assert not _get_current_function_mode_stack()
    assert hidden.size
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(batch), expected)


@AMBIGUOUS
@pytest.mark.parametrize("error", [Fault, Interruption])
@pytest.mark.parametrize("kind", [AtFunction, AtLine])
def test_an_error_that_ends_the_recording(kind, error, model, batch, tmp_path) -> None:
    with trace(model):
        model(batch)
        count = places(kind, lambda: model(batch))
    for number, line in enumerate(range(1, count + 1, 61 if kind is AtLine else 5)):
        path = tmp_path / f"{number}.h5"
        tracer = trace(model, path=path)
        tracer.start()
        model(batch)
        raised = False
        try:
            with tracer, kind(line, error):
                model(batch)
        except error:
            raised = True
        assert raised or line > 0.8 * count
        assert not any(
            module._forward_hooks or module._forward_pre_hooks for module in model.modules()
        )
        assert not _get_current_function_mode_stack()
        with grutrace.open(path) as reopened:
            assert 4 <= len(reopened.calls) <= 8
            assert reopened.closed
            assert all(reopened[site].residual < 1e-5 for site in reopened.sites)


def test_control_the_injectors_raise(model, batch) -> None:
    with pytest.raises(Fault), AtFunction(1, Fault):
        model(batch)
    with trace(model):
        with pytest.raises(Fault), AtLine(1, Fault):
            model(batch)
        model(batch)
    # Before PyTorch 2.9, the kernels stay while another thread runs Python, such as pytest-xdist's.
    if not subscription.is_observing():
        with AtLine(1, Fault):
            model(batch)  # nothing of grutrace's runs


class FailingSink:
    """Lets k records through and fails then, as a full disk does."""

    def __init__(self, sink, records_left: int) -> None:
        self._sink, self.left = sink, records_left

    def __getattr__(self, name):
        return getattr(self._sink, name)

    def append(self, record) -> None:
        self.left -= 1
        if self.left == 0:
            raise grutrace.SinkError("the disk is full, on purpose")
        self._sink.append(record)


@AMBIGUOUS
@pytest.mark.parametrize("failing", range(1, 12))
def test_a_sink_that_fails_at_any_record(failing, model, batch) -> None:
    expected = model(batch)
    tracer = trace(model)
    tracer._guarded_sink.sink = FailingSink(tracer._guarded_sink.sink, failing)
    healthy = trace(model)
    with healthy, tracer:
        failures = 0
        for _ in range(3):
            try:
                assert torch.equal(model(batch), expected)
            except grutrace.SinkError:
                failures += 1
        assert failures == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    # Another tracer of the same model does not suffer from it.
    modules = healthy.calls["module"].tolist()
    assert modules.count("stack") == 3
    assert len(modules) > 4 * 2
    assert tracer["stack.l0"].residual < 1e-5


def test_an_interruption_does_not_affect_other_models(batch) -> None:
    class Interrupted(nn.GRU):
        def forward(self, *_):
            raise Interruption("on purpose")

    layer, other, x = Interrupted(2, 3, 2), nn.GRU(2, 3, 2), torch.randn(4, 2, 2)
    expected = other(x)
    tracer = trace(layer)
    tracer.start()
    with pytest.raises(Interruption):
        layer(x)
    assert all(map(torch.equal, other(x), expected))
    assert len(tracer.calls) == 0
    tracer.stop()
    with pytest.warns(grutrace.GrutraceWarning, match="nothing was recorded of the model"):
        tracer.close()
