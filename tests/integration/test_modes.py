"""Modes and hooks of other code see no difference; a removed hook is reported."""

from __future__ import annotations

import gc
import re
import weakref

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import grutrace
from tests.integration.models import CALLS, Mixed, eagerly, trace, words

#: What a replay would be made of; looking at shapes is no computation.
COMPUTE = re.compile("gru|linear|mm|sigmoid|tanh|max|lerp")


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [Functions, Operations])
@pytest.mark.parametrize("stacks", ["split", "rerun"])
def test_a_mode_of_the_user_does_not_see_the_replay(kind, stacks, model, batch) -> None:
    with kind() as untraced:
        model(batch)
    with trace(model, stacks=stacks) as tracer, kind() as traced:
        model(batch)
    assert len(tracer.calls) == len(CALLS)
    before, after = (list(filter(COMPUTE.search, mode.seen)) for mode in (untraced, traced))
    assert len(before) > 3
    assert after == before


@pytest.mark.parametrize("stacks", ["split", "rerun"])
def test_an_operation_counter_counts_only_the_models_operations(stacks, model, batch) -> None:
    counted = []
    for item in (None, trace(model, stacks=stacks)):
        if item is not None:
            item.start()
        with FlopCounterMode(display=False) as counter:
            model(batch)
        counted.append(counter.get_total_flops())
        if item is not None:
            item.close()
    assert counted[0] == counted[1] > 0


def test_a_default_device_or_type_changes_nothing(model, batch) -> None:
    _, eager = eagerly(model, lambda: model(batch))
    torch.set_default_dtype(torch.float64)
    try:
        with trace(model) as tracer:
            model(batch)
    finally:
        torch.set_default_dtype(torch.float32)
    assert tracer["cell.cell"].hidden.dtype == eager["cell.cell"].hidden.dtype


@pytest.mark.parametrize("path", ["stack", "layer", "cell"])
def test_tracing_survives_cleared_hooks(path, model, batch) -> None:
    module = model.get_submodule(path)
    with words() as messages, trace(model) as tracer:
        model(batch)
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
        model(batch)
    assert not messages
    assert tracer.calls["module"].tolist() == CALLS * 2


@pytest.mark.parametrize("layers", [1, 2])
def test_other_hook_handles_still_work(layers) -> None:
    layer = nn.GRU(2, 3, layers)
    called = []
    handles = [layer.register_forward_hook(lambda *_: called.append(1))]
    with trace(layer):
        handles.append(layer.register_forward_hook(lambda *_: called.append(2)))
        layer(torch.randn(4, 2, 2))
        handles[0].remove()
        layer(torch.randn(4, 2, 2))
    layer(torch.randn(4, 2, 2))
    assert called == [1, 2, 2, 2]
    handles[1].remove()
    assert not layer._forward_hooks


def test_full_backward_hooks_of_the_user(batch) -> None:
    seen = []
    batch.requires_grad_()
    model = Mixed(dropout=0.0)
    for module in (model.stack, model.layer, model.cell):
        module.register_full_backward_hook(lambda _, i, o: seen.append([*i, *o]))
    model(batch).sum().backward()
    expected, seen = seen, []
    with trace(model) as tracer:
        model(batch).sum().backward()
    assert len(tracer.calls) == len(CALLS)
    assert len(seen) == len(expected) > 0
    for a, b in zip(expected, seen, strict=True):
        assert all(
            (x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True)
        )


def test_an_attached_model_and_tracer_are_garbage_collected(tmp_path, batch) -> None:
    """No reference of grutrace keeps them alive, and the file is closed."""
    model = Mixed()
    tracer = trace(model, path=tmp_path / "run.h5")
    tracer.start()
    model(batch)
    gone = weakref.ref(model.cell), weakref.ref(tracer)
    with words() as messages:
        del model, tracer
        gc.collect()
    assert len(messages) == 1
    assert "a tracer was garbage-collected while recording" in messages[0]
    assert [reference() for reference in gone] == [None, None]
    with grutrace.open(tmp_path / "run.h5") as reopened:
        assert reopened.closed
        assert reopened.calls["module"].tolist() == CALLS


@pytest.mark.parametrize("with_block", [True, False])
def test_a_module_that_was_never_called_is_reported(with_block, model, batch) -> None:
    with words() as messages:
        tracer = trace(model)
        if with_block:
            with tracer:
                model.layer(batch.repeat(1, 1, 2)[..., :4])
        else:
            tracer.start()
            model.layer(batch.repeat(1, 1, 2)[..., :4])
            tracer.close()
            tracer.close()
    assert len(messages) == 1
    assert messages[0].startswith(
        "nothing was recorded of stack, cell: no call of PyTorch's GRU kernel"
    )


def test_a_tracer_that_never_recorded_or_failed_reports_nothing(model, batch) -> None:
    with words() as messages:
        trace(model, recording=False).close()
        with pytest.raises(ValueError, match="on purpose"), trace(model):
            raise ValueError("on purpose")
    assert messages == []


def test_unknown_dropout_masks_are_reported(monkeypatch) -> None:
    """On devices other than a CPU. The test only fakes the device."""
    monkeypatch.setattr("grutrace.capture.kernel_calls.observation._on_cpu", lambda _: False)
    layer, x = nn.GRU(3, 4, 2, dropout=0.5), torch.randn(5, 2, 3)
    torch.manual_seed(1)
    expected = layer(x)
    torch.manual_seed(1)
    with (
        pytest.warns(grutrace.GrutraceWarning, match=r"pass stacks='split'"),
        grutrace.trace(layer) as trace,
    ):
        result = layer(x)
    assert all(map(torch.equal, expected, result))
    assert len(trace.calls) == 0
    with grutrace.trace(layer, stacks="split") as trace:
        layer(x)
    with grutrace.trace(layer.eval()) as evaluated:
        layer(x)
    assert len(trace.calls) == len(evaluated.calls) == 1
