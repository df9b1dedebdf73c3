"""An attached model gives the same graph as before; a warning names the missed calls."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.integration.models import CALLS, about, assert_same, eagerly, trace, words

pytestmark = [
    # PyTorch's own, about ways that it would rather see gone, and about every nn.GRU it exports.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The tensor attributes self:UserWarning"),
]


def exported(model, batch) -> str:
    return str(torch.export.export(model, (batch,), strict=False).graph)


def turned(model, batch) -> str:
    return make_fx(model)(batch).code


@pytest.mark.parametrize("way", [exported, turned])
def test_graphs_are_unchanged_and_missed_modules_are_named_once(way, model, batch) -> None:
    expected = way(model, batch)
    with words() as messages, trace(model) as tracer:
        assert way(model, batch) == expected
    assert len(tracer.calls) == 0
    # PyTorch's exporter takes a cell apart before any kernel is called, and layers too unless
    # something else was made into a graph before: said at the end.
    ended = [re.match(r"nothing was recorded of ([\w, ]+):", message) for message in messages]
    named = [message for message, end in zip(messages, ended, strict=True) if end is None]
    apart = [name for end in ended if end is not None for name in end[1].split(", ")]
    assert sorted([*about(named), *apart]) == ["cell", "layer", "stack"]
    assert all("call the model itself with real tensors" in message for message in named)
    # The control: another model has another graph.
    assert way(nn.Sequential(model, nn.ReLU()), batch) != expected


def test_a_model_is_recorded_after_its_export(model, batch) -> None:
    _, eager = eagerly(model, lambda: model(batch))
    with trace(model) as tracer:
        with words():
            exported(model, batch)
        model(batch)
    assert_same(eager, tracer)


def test_strict_export_while_recording_is_unchanged(model, batch) -> None:
    expected = str(torch.export.export(model, (batch,), strict=True).graph)
    with words(), trace(model) as tracer:
        assert str(torch.export.export(model, (batch,), strict=True).graph) == expected
        model(batch)
    assert tracer.calls["module"].tolist() == CALLS


def test_an_fx_graph_keeps_its_grus_and_is_recorded(model, batch) -> None:
    code = torch.fx.symbolic_trace(model).code
    _, eager = eagerly(model, lambda: model(batch))
    with trace(model) as tracer:
        graph = torch.fx.symbolic_trace(model)
        assert graph.code == code
        graph(batch)
    assert_same(eager, tracer)


def kinds(graph) -> list[str]:
    return [node.kind() for node in graph.nodes()]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace_of_an_attached_model(model, batch) -> None:
    expected = torch.jit.trace(model, (batch,), check_trace=False).inlined_graph
    with trace(model) as tracer:
        with words() as messages:
            traced = torch.jit.trace(model, (batch,), check_trace=False)
        assert kinds(traced.inlined_graph) == kinds(expected)
        # A layer is one operation in the graph, and runs as ever. A cell is taken apart.
        assert about(messages) == ["cell"]
        assert "torch.jit.trace was tracing it" in messages[0]
        assert tracer.calls["module"].tolist() == ["stack", "layer"]
        model(batch)
    assert tracer.calls["module"].tolist() == ["stack", "layer", *CALLS]
    torch.testing.assert_close(traced(batch), model(batch))


def test_jit_script_of_a_traced_model_is_unchanged() -> None:
    model, x = nn.Sequential(nn.GRU(3, 4, 2)), torch.randn(5, 2, 3)
    expected = torch.jit.script(model)
    with trace(model) as tracer:
        scripted = torch.jit.script(model)
        assert str(scripted.inlined_graph) == str(expected.inlined_graph)
        # The script runs the kernel with the weights of the model, and so is recorded as well.
        assert torch.equal(scripted(x)[0], expected(x)[0])
        model(x)
    assert len(tracer.calls) == 3
    np.testing.assert_array_equal(
        tracer["0.l1"].sequence(0).hidden, tracer["0.l1"].sequence(4).hidden
    )


def test_fake_tensors(model, batch) -> None:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with words() as messages, trace(model) as tracer, fake:
        model(fake.from_tensor(batch))
    assert about(messages) == ["stack", "layer", "cell"]
    assert len(tracer.calls) == 0


def test_a_model_on_the_meta_device(model, batch) -> None:
    on_meta = copy.deepcopy(model).to("meta")
    with words() as messages, trace(on_meta) as tracer:
        assert on_meta(batch.to("meta")).shape == (2, 2)
    assert about(messages) == ["stack", "layer", "cell"]
    assert "called with a Tensor on meta" in messages[0]
    assert len(tracer.calls) == 0
