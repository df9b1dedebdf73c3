"""With torch.compile, a traced call stays outside the graphs and is recorded."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from grutrace.capture.kernel_calls import compiled_graphs
from tests import forks
from tests.integration.models import CALLS, assert_same, eagerly, trace, words

# What PyTorch warns of itself, of any graph that is split.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")

BACKENDS = ["eager", "aot_eager"]

# Before PyTorch 2.6, compiled code cannot run as Python code, and what is in a graph is unknown.
CAN_RUN_EAGERLY = compiled_graphs.can_run_eagerly()

# From PyTorch 2.15 on, the code that follows nn.GRU is compiled, too, with its cells.
COMPILES_WHAT_FOLLOWS = torch.__version__ >= (2, 15)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compile_first(model, backend):
    compiled = torch.compile(model, backend=backend)
    return compiled, lambda: trace(model)


def trace_the_compiled(model, backend):
    compiled = torch.compile(model, backend=backend)
    return compiled, lambda: trace(compiled)


def compile_in_place(model, backend):
    model.compile(backend=backend)
    return model, lambda: trace(model)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("way", [compile_first, trace_the_compiled, compile_in_place])
def test_compiled_before_attaching(way, warm, backend, model, batch, caplog) -> None:
    expected, eager = eagerly(model, lambda: model(batch))
    compiled, attach = way(model, backend)
    if warm:
        compiled(batch)
    with words() as messages, attach() as file:
        result = compiled(batch)
    if COMPILES_WHAT_FOLLOWS and not warm:
        assert any("Pass compiled='eager'" in message for message in messages)
        # The backend "eager" runs the cell's kernel as it is.
        calls = CALLS if backend == "eager" else CALLS[:2]
        assert [call.removeprefix("_orig_mod.") for call in file.calls["module"]] == calls
        assert torch.equal(compiled(batch), result)
        return
    assert not messages
    assert [call.removeprefix("_orig_mod.") for call in file.calls["module"]] == CALLS
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    if way is not trace_the_compiled:
        assert_same(eager, file)
    assert torch.equal(compiled(batch), result)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_while_attached(backend, model, batch) -> None:
    _, eager = eagerly(model, lambda: model(batch))
    with words() as messages, trace(model) as tracer:
        compiled = torch.compile(model, backend=backend)
        compiled(batch)
    if COMPILES_WHAT_FOLLOWS:
        assert any("Pass compiled='eager'" in message for message in messages)
    else:
        assert not messages
        assert_same(eager, tracer)
    with trace(model) as again:
        compiled(batch)
    assert_same(eager, again)


def test_a_compiled_training_step(model, batch) -> None:
    model.train()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        compiled(batch).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    compiled = torch.compile(model, backend="aot_eager")
    untraced = gradients()
    with trace(model, compiled="eager" if COMPILES_WHAT_FOLLOWS else "auto") as tracer:
        traced = gradients()
    assert tracer.calls["module"].tolist() == CALLS
    for a, b in zip(untraced, traced, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.fixture
def cell() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.GRUCell(3, 3))


def as_module(cell, fullgraph):
    return torch.compile(cell, backend="aot_eager", fullgraph=fullgraph)


def as_function(cell, fullgraph):
    return torch.compile(lambda x: cell(x) * 1, backend="aot_eager", fullgraph=fullgraph)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("way", [as_module, as_function])
def test_every_call_of_a_graph_with_a_cell_is_recorded(way, fullgraph, cell) -> None:
    compiled, x = way(cell, fullgraph), torch.randn(2, 3)
    expected = compiled(x)
    with words() as messages, trace(cell) as tracer:
        torch.testing.assert_close(compiled(x), expected)
        cell(x)
        compiled(x)
    if not CAN_RUN_EAGERLY:
        assert len(tracer.calls) == len(messages) == 1
        assert "Call the model itself" in messages[0]
        return
    assert not messages
    assert len(tracer.calls) == 3
    # The compiled code is what runs again, and the control: nothing of it is observed.
    with words() as messages, trace(cell, compiled="keep") as lost:
        assert torch.equal(compiled(x), expected)
        cell(x)
    assert len(lost.calls) == 1
    assert len(messages) == 1
    assert "Pass compiled='eager'" in messages[0]


def test_a_cell_compiled_during_a_recording_is_reported(cell) -> None:
    x = torch.randn(2, 3)
    with words() as messages, trace(cell) as tracer:
        as_module(cell, True)(x)
        cell(x)
    assert len(tracer.calls) == 1
    if not CAN_RUN_EAGERLY:
        assert messages
        return
    assert len(messages) == 1
    assert "if it belongs to this model" in messages[0]
    assert "Pass compiled='eager'" in messages[0]
    torch.compiler.reset()
    with words() as messages, trace(cell, compiled="eager") as tracer:
        as_module(cell, True)(x)
    assert len(tracer.calls) == 1
    assert not messages


def test_another_model_is_compiled_whole_during_a_recording(cell) -> None:
    other, x = nn.Sequential(nn.GRUCell(3, 3)), torch.randn(2, 3)
    with words(), trace(cell) as tracer:
        for fullgraph in (True, False):
            torch.compiler.reset()
            compiled = as_module(other, fullgraph)
            torch.testing.assert_close(compiled(x), other(x))
        cell(x)
    assert len(tracer.calls) == 1


@pytest.mark.skipif(not CAN_RUN_EAGERLY, reason="PyTorch before 2.6 has no stance")
def test_the_users_own_stance_is_restored(cell) -> None:
    with torch.compiler.set_stance("eager_on_recompile"), trace(cell, compiled="eager"):
        assert torch._dynamo.eval_frame._stance.stance == "force_eager"
        with trace(cell, compiled="eager"):
            cell(torch.randn(2, 3))
        assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    assert torch._dynamo.eval_frame._stance.stance == "default"


@pytest.mark.parametrize("layers", [1, 2])
def test_a_gru_compiled_with_allow_rnn_is_reported(layers) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 3, layers))
    x = torch.randn(4, 3)
    _, eager = eagerly(model, lambda: model(x))
    with torch._dynamo.config.patch(allow_rnn=True), words() as messages, trace(model) as tracer:
        torch.compile(model, backend="eager")(x)
    if not CAN_RUN_EAGERLY:
        assert any("Call the model itself" in message for message in messages)
        return
    # This graph does run the kernel as it is, which others do not.
    assert len(messages) == 1
    assert "if it belongs to this model" in messages[0]
    assert_same(eager, tracer)


SCRIPT = """
import sys, warnings
import torch, grutrace
warnings.simplefilter("error", grutrace.GrutraceWarning)
from torch import nn
model = nn.Sequential(nn.Linear(3, 3), nn.GRU(3, 3, {layers}))
x = torch.randn(4, 3)
with grutrace.trace(model, check="raise") as trace:
    model(x)
    assert "torch._dynamo" not in sys.modules, "attaching has loaded the compiler"
    compiled = torch.compile(model, backend="{backend}")
    compiled(x)
    compiled(x)
assert len(trace.calls) == 3, trace.calls
assert compiled(x)[0].equal(model(x)[0]) or "{backend}" == "inductor"
"""


@pytest.mark.parametrize(("layers", "backend"), [(1, "eager"), (2, "inductor")])
def test_compiling_after_attaching(layers, backend) -> None:
    script = SCRIPT.format(layers=layers, backend=backend)
    done = forks.run("-c", script)
    if not CAN_RUN_EAGERLY:
        # PyTorch before 2.6 makes a graph of a layer in nn.Sequential.
        assert "GrutraceWarning" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert "grutrace" not in done.stderr


@pytest.mark.parametrize("name", ["input_codes", "_debug_get_cache_entry_list"])
def test_graphs_that_cannot_be_looked_into_count(name, monkeypatch) -> None:
    from torch._dynamo import convert_frame

    torch.compile(nn.Linear(3, 3), backend="eager")(torch.randn(2, 3))
    if CAN_RUN_EAGERLY:
        # The control: this graph contains no GRU.
        assert not compiled_graphs.any_with_gru_kernel()
    where = convert_frame if name == "input_codes" else torch._C._dynamo.eval_frame
    with monkeypatch.context() as without:
        without.delattr(where, name)
        assert compiled_graphs.any_with_gru_kernel()


@pytest.mark.skipif(not CAN_RUN_EAGERLY, reason="what is in a graph is unknown")
@pytest.mark.parametrize("first_has_gru", [False, True])
def test_graphs_are_looked_into_again_after_a_reset(first_has_gru) -> None:
    class Around(nn.Module):
        """Runs a module; its `forward` has one code object, whatever the module is."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    for has_gru in (first_has_gru, not first_has_gru):
        torch.compiler.reset()
        inner = nn.GRUCell(3, 3) if has_gru else nn.Linear(3, 3)
        torch.compile(Around(inner), backend="eager")(torch.randn(2, 3))
        assert compiled_graphs.any_with_gru_kernel() is has_gru
